#include "bpf/program.h"

#include <assert.h>
#include <stddef.h>

#include "common/flows.h"

/* ---- instructions ------------------------------------------------------------------------ */

/* A place that is jumped to before it is known. */
enum label {
    LABEL_KNOWN,
    LABEL_TRIMMED,
    LABEL_BROKEN,
    LABEL_SAME_EPOCH,
    LABEL_FULL,
    LABEL_PASS,
    LABEL_SAME_PASSED,
    LABEL_UNCHARGED,
    LABEL_LEAVE,
    LABEL_DROP,
    LABELS
};

struct writer {
    struct bpf_insn *program;
    uint32_t count;
    uint32_t targets[LABELS];
    uint8_t label_of[KECHO_PROGRAM_MOST]; /* of a jump: its label + 1 */
};

static void put(struct writer *w, uint8_t code, int dst, int src, int16_t offset, int32_t imm) {
    assert(w->count < KECHO_PROGRAM_MOST);
    w->program[w->count++] = (struct bpf_insn){
        .code = code, .dst_reg = dst & 15, .src_reg = src & 15, .off = offset, .imm = imm};
}

#define R(n) BPF_REG_##n
#define MOVE(dst, src) put(w, BPF_ALU64 | BPF_MOV | BPF_X, dst, src, 0, 0)
#define SET(dst, value) put(w, BPF_ALU64 | BPF_MOV | BPF_K, dst, 0, 0, (int32_t)(value))
#define ADD(dst, src) put(w, BPF_ALU64 | BPF_ADD | BPF_X, dst, src, 0, 0)
#define SUBTRACT(dst, src) put(w, BPF_ALU64 | BPF_SUB | BPF_X, dst, src, 0, 0)
#define SUBTRACT32(dst, src) put(w, BPF_ALU | BPF_SUB | BPF_X, dst, src, 0, 0)
#define ADD_NUMBER(dst, value) put(w, BPF_ALU64 | BPF_ADD | BPF_K, dst, 0, 0, (int32_t)(value))
#define AND_NUMBER(dst, value) put(w, BPF_ALU64 | BPF_AND | BPF_K, dst, 0, 0, (int32_t)(value))
#define SHIFT_LEFT(dst, bits) put(w, BPF_ALU64 | BPF_LSH | BPF_K, dst, 0, 0, bits)
#define SHIFT_RIGHT(dst, bits) put(w, BPF_ALU64 | BPF_RSH | BPF_K, dst, 0, 0, bits)
#define LOAD64(dst, src, at) put(w, BPF_LDX | BPF_MEM | BPF_DW, dst, src, (int16_t)(at), 0)
#define LOAD8(dst, src, at) put(w, BPF_LDX | BPF_MEM | BPF_B, dst, src, (int16_t)(at), 0)
#define LOAD32(dst, src, at) put(w, BPF_LDX | BPF_MEM | BPF_W, dst, src, (int16_t)(at), 0)
#define STORE64(dst, at, src) put(w, BPF_STX | BPF_MEM | BPF_DW, dst, src, (int16_t)(at), 0)
#define STORE32(dst, at, src) put(w, BPF_STX | BPF_MEM | BPF_W, dst, src, (int16_t)(at), 0)
/* src becomes what was there; a full barrier, which without BPF_FETCH it is not everywhere. */
#define FETCH_ADD64(dst, at, src)                                                                  \
    put(w, BPF_STX | BPF_ATOMIC | BPF_DW, dst, src, (int16_t)(at), BPF_ADD | BPF_FETCH)
#define ATOMIC_ADD64(dst, at, src)                                                                 \
    put(w, BPF_STX | BPF_ATOMIC | BPF_DW, dst, src, (int16_t)(at), BPF_ADD)
#define CALL(function) put(w, BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_##function)
#define EXIT() put(w, BPF_JMP | BPF_EXIT, 0, 0, 0, 0)
/* A map, or the address of its one element: two instructions. */
#define MAP(dst, fd) put_wide(w, dst, BPF_PSEUDO_MAP_FD, fd, 0)
#define ELEMENT(dst, fd, at) put_wide(w, dst, BPF_PSEUDO_MAP_VALUE, fd, (int32_t)(at))
#define CALL_KERNEL(id) put(w, BPF_JMP | BPF_CALL, 0, BPF_PSEUDO_KFUNC_CALL, 0, id)
#define GOTO(label) jump(w, BPF_JMP | BPF_JA, 0, 0, 0, label)
#define GOTO_IF_NUMBER(left, test, value, label)                                                   \
    jump(w, BPF_JMP | test | BPF_K, left, 0, (int32_t)(value), label)
#define GOTO_IF(left, test, right, label) jump(w, BPF_JMP | test | BPF_X, left, right, 0, label)
#define HERE(label) (w->targets[label] = w->count)

static void put_wide(struct writer *w, int dst, int src, int32_t fd, int32_t offset) {
    put(w, BPF_LD | BPF_IMM | BPF_DW, dst, src, 0, fd);
    put(w, 0, 0, 0, 0, offset);
}

static void jump(struct writer *w, uint8_t code, int dst, int src, int32_t imm, enum label label) {
    put(w, code, dst, src, 0, imm);
    w->label_of[w->count - 1] = (uint8_t)(label + 1);
}

/* A jump counts from the instruction behind it. */
static void resolve(struct writer *w) {
    uint32_t i;
    for (i = 0; i < w->count; i++)
        if (w->label_of[i] != 0)
            w->program[i].off = (int16_t)(w->targets[w->label_of[i] - 1] - i - 1);
}

/* ---- the program ------------------------------------------------------------------------- */

/* On the stack. */
#define COOKIE (-8)
#define BYTE (-16)
#define WORD (-24)

#define TRIM_MOST 4095
#define TRIMS_MOST 160

/* Registers that calls leave alone. */
#define SKB R(6)
#define FLOW R(7)
#define TCP R(8)
#define LENGTH R(9)

#define OF_FLOW(member) offsetof(struct kecho_flow, member)

/* r0 = the flow of R(6)'s socket, if there is one. */
static void write_lookup(struct writer *w, const struct kecho_program_places *places) {
    MOVE(R(1), SKB);
    CALL(get_socket_cookie);
    STORE64(R(10), COOKIE, R(0));
    MAP(R(1), places->flows_fd);
    MOVE(R(2), R(10));
    ADD_NUMBER(R(2), COOKIE);
    CALL(map_lookup_elem);
    GOTO_IF_NUMBER(R(0), BPF_JEQ, 0, LABEL_LEAVE);
    MOVE(FLOW, R(0));
}

static void write_tcp_sock(struct writer *w) {
    LOAD64(R(1), SKB, offsetof(struct __sk_buff, sk));
    GOTO_IF_NUMBER(R(1), BPF_JEQ, 0, LABEL_LEAVE);
    CALL(skc_to_tcp_sock);
    GOTO_IF_NUMBER(R(0), BPF_JEQ, 0, LABEL_LEAVE);
    MOVE(TCP, R(0));
}

/* r1 = bytes that have come and that nobody has taken: rcv_nxt - copied_seq; uses r5. */
static void write_unread(struct writer *w, const struct kecho_program_places *places) {
    LOAD32(R(1), TCP, places->rcv_nxt);
    LOAD32(R(5), TCP, places->copied_seq);
    SUBTRACT32(R(1), R(5));
}

/* Finds the flow and its socket. A FIN that comes alone is an skb without bytes, and breaks the
 * queue when it is sent or passed: the backlog takes a 0 for an error. TCP knows of it already. */
static void write_beginning(struct writer *w, const struct kecho_program_places *places) {
    MOVE(SKB, R(1));
    LOAD32(LENGTH, SKB, offsetof(struct __sk_buff, len));
    GOTO_IF_NUMBER(LENGTH, BPF_JEQ, 0, LABEL_DROP);
    write_lookup(w, places); /* none: it is being closed */
    write_tcp_sock(w);
    LOAD32(R(1), FLOW, OF_FLOW(mode));
    GOTO_IF_NUMBER(R(1), BPF_JEQ, FLOW_BROKEN, LABEL_DROP);
}

/* An skb may begin with bytes that an earlier one has brought, when a sender that missed an
 * acknowledgement sent several segments again as one. recv() leaves them out, tcp_read_skb() does
 * not: without this they would be echoed twice. */
static void write_trim(struct writer *w, const struct kecho_program_places *places) {
    uint32_t again;
    /* The first one begins where nobody has read yet. */
    LOAD64(R(2), FLOW, OF_FLOW(redirected));
    LOAD64(R(3), FLOW, OF_FLOW(passed));
    ADD(R(2), R(3));
    GOTO_IF_NUMBER(R(2), BPF_JNE, 0, LABEL_KNOWN);
    LOAD32(R(1), TCP, places->copied_seq);
    STORE32(FLOW, OF_FLOW(first), R(1));
    HERE(LABEL_KNOWN);
    LOAD32(R(3), FLOW, OF_FLOW(first));
    ADD(R(2), R(3));
    STORE32(R(10), WORD, R(2));
    /* r9 = the sequence number that is due, less the skb's. */
    MOVE(R(1), SKB);
    CALL_KERNEL(places->bpf_cast_to_kern_ctx);
    LOAD32(R(1), R(0), places->seq);
    LOAD32(R(9), R(10), WORD);
    SUBTRACT32(R(9), R(1));
    STORE32(FLOW, OF_FLOW(trim), R(9));
    GOTO_IF_NUMBER(R(9), BPF_JEQ, 0, LABEL_TRIMMED);
    LOAD32(R(1), SKB, offsetof(struct __sk_buff, len));
    GOTO_IF(R(9), BPF_JGT, R(1), LABEL_BROKEN); /* or bytes are missing before it */
    /* bpf_skb_adjust_room() takes off 4095 at most. What is left stands in the map, where the
     * verifier does not follow it: it would go through every value. */
    SET(R(9), 0);
    again = w->count;
    MOVE(R(1), SKB);
    LOAD32(R(2), FLOW, OF_FLOW(trim));
    put(w, BPF_JMP | BPF_JLE | BPF_K, 2, 0, 1, TRIM_MOST);
    SET(R(2), TRIM_MOST);
    LOAD32(R(3), FLOW, OF_FLOW(trim));
    SUBTRACT(R(3), R(2));
    STORE32(FLOW, OF_FLOW(trim), R(3));
    put(w, BPF_ALU64 | BPF_NEG, 2, 0, 0, 0);
    SET(R(3), 0);
    SET(R(4), 0);
    CALL(skb_adjust_room);
    GOTO_IF_NUMBER(R(0), BPF_JNE, 0, LABEL_BROKEN);
    LOAD32(R(1), FLOW, OF_FLOW(trim));
    GOTO_IF_NUMBER(R(1), BPF_JEQ, 0, LABEL_TRIMMED);
    ADD_NUMBER(R(9), 1);
    put(w, BPF_JMP | BPF_JLT | BPF_K, 9, 0, (int16_t)((int)again - (int)w->count - 1), TRIMS_MOST);
    GOTO(LABEL_BROKEN);
    HERE(LABEL_TRIMMED);
    LOAD32(LENGTH, SKB, offsetof(struct __sk_buff, len));
    GOTO_IF_NUMBER(LENGTH, BPF_JEQ, 0, LABEL_DROP);
    LOAD32(R(1), FLOW, OF_FLOW(mode));
    GOTO_IF_NUMBER(R(1), BPF_JNE, FLOW_ECHOED, LABEL_PASS);
}

/* FLOW_ECHOED: back to the socket, unless too much waits to be sent. */
static void write_echo(struct writer *w, const struct kecho_program_places *places) {
    /* r1 = bytes that have left the queue: bytes_acked + (write_seq - snd_una), the latter being
     * what the socket holds, which is charged to it. */
    LOAD32(R(1), TCP, places->write_seq);
    LOAD32(R(2), TCP, places->snd_una);
    SUBTRACT32(R(1), R(2));
    LOAD64(R(2), TCP, places->bytes_acked);
    ADD(R(1), R(2));
    /* A new epoch, if nothing of the one before the last is in the queue any more. */
    LOAD32(R(4), FLOW, OF_FLOW(charge));
    LOAD64(R(2), FLOW, OF_FLOW(mark));
    GOTO_IF(R(1), BPF_JLT, R(2), LABEL_SAME_EPOCH);
    STORE32(FLOW, OF_FLOW(charge_before), R(4));
    SET(R(4), 0);
    LOAD64(R(1), FLOW, OF_FLOW(redirected));
    STORE64(FLOW, OF_FLOW(mark), R(1));
    HERE(LABEL_SAME_EPOCH);
    /* r4 = the charge of both with this skb; too much? */
    ADD(R(4), LENGTH);
    ADD_NUMBER(R(4), KECHO_SKB_CHARGE);
    STORE32(FLOW, OF_FLOW(charge), R(4));
    LOAD32(R(1), FLOW, OF_FLOW(charge_before));
    ADD(R(4), R(1));
    ELEMENT(R(2), places->board_fd, offsetof(struct kecho_flow_board, charge_most));
    LOAD64(R(2), R(2), 0);
    GOTO_IF(R(4), BPF_JGT, R(2), LABEL_FULL);
    /* Or more than the socket has room for? What is queued can then always be sent, whatever the
     * client does, and stands in nobody's way: what is passed behind a queue that does not move is
     * not charged, and no window closes. */
    SHIFT_LEFT(R(4), 1); /* charged for sending, 16 KiB cost 22: tried on 6.18 */
    LOAD32(R(1), TCP, places->sk_wmem_queued);
    ADD(R(4), R(1));
    LOAD32(R(2), TCP, places->sk_sndbuf);
    GOTO_IF(R(4), BPF_JGT, R(2), LABEL_FULL);
    LOAD64(R(1), FLOW, OF_FLOW(redirected));
    ADD(R(1), LENGTH);
    STORE64(FLOW, OF_FLOW(redirected), R(1));
    /* Counted for this CPU; a softirq may come between two instructions. */
    CALL(get_smp_processor_id);
    AND_NUMBER(R(0), KECHO_FLOW_CPUS - 1);
    SHIFT_LEFT(R(0), 6);
    ELEMENT(R(1), places->board_fd, offsetof(struct kecho_flow_board, cpus));
    ADD(R(1), R(0));
    ATOMIC_ADD64(R(1), offsetof(struct kecho_flow_counters, bytes), LENGTH);
    SET(R(2), 1);
    ATOMIC_ADD64(R(1), offsetof(struct kecho_flow_counters, chunks), R(2));
    /* To the very socket, flags 0: to be sent. The verdict is SK_PASS, or SK_DROP if the socket
     * has left the map this moment, see flow_leave(). */
    MOVE(R(1), SKB);
    MAP(R(2), places->sockets_fd);
    MOVE(R(3), R(10));
    ADD_NUMBER(R(3), COOKIE);
    SET(R(4), 0);
    CALL(sk_redirect_hash);
    EXIT();
}

static void write_output(struct writer *w, const struct kecho_program_places *places) {
    MAP(R(1), places->reports_fd);
    MOVE(R(2), FLOW);
    ADD_NUMBER(R(2), OF_FLOW(token));
    SET(R(3), sizeof(((struct kecho_flow *)0)->token));
    /* Always wakes whoever waits: by itself it would not while others are being read. */
    SET(R(4), BPF_RB_FORCE_WAKEUP);
    CALL(ringbuf_output);
}

/* Tells user space of the flow; r0 = 0 if the reports had room. If not, there may be no later skb
 * to try it with: `untold` has user space look at every flow, when it has read what fills the
 * reports. Tried again after that, since all of it may have been read just before. */
static void write_tell(struct writer *w, const struct kecho_program_places *places) {
    uint32_t told;
    write_output(w, places);
    told = w->count;
    put(w, BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 0, 0);
    ELEMENT(R(1), places->board_fd, offsetof(struct kecho_flow_board, untold));
    SET(R(2), 1);
    FETCH_ADD64(R(1), 0, R(2));
    write_output(w, places);
    w->program[told].off = (int16_t)(w->count - told - 1);
}

/* FLOW_PASSED: to the queue that user space reads, behind what was redirected. That one is charged
 * to the socket, so its window closes; but by bytes, so that small skbs, of which a window holds
 * many, are counted here, for the filter. */
static void write_pass(struct writer *w, const struct kecho_program_places *places) {
    HERE(LABEL_FULL);
    SET(R(1), FLOW_PASSED);
    STORE32(FLOW, OF_FLOW(mode), R(1));
    SET(R(2), 0);
    STORE32(FLOW, OF_FLOW(charge), R(2));
    STORE32(FLOW, OF_FLOW(charge_before), R(2));
    STORE64(FLOW, OF_FLOW(mark), R(2));
    HERE(LABEL_PASS);
    /* r2 = what user space has read of them: passed + this one - (rcv_nxt - copied_seq); less
     * than that if more has come behind this one. */
    LOAD64(R(3), FLOW, OF_FLOW(passed));
    MOVE(R(2), R(3));
    ADD(R(2), LENGTH);
    write_unread(w, places);
    SUBTRACT(R(2), R(1));
    LOAD32(R(4), FLOW, OF_FLOW(charge));
    LOAD64(R(5), FLOW, OF_FLOW(mark));
    GOTO_IF(R(2), BPF_JSLT, R(5), LABEL_SAME_PASSED);
    STORE32(FLOW, OF_FLOW(charge_before), R(4));
    SET(R(4), 0);
    STORE64(FLOW, OF_FLOW(mark), R(3));
    HERE(LABEL_SAME_PASSED);
    ADD(R(3), LENGTH);
    STORE64(FLOW, OF_FLOW(passed), R(3));
    /* An skb is charged for what it lacks in bytes. */
    SET(R(5), KECHO_SKB_CHARGE);
    GOTO_IF(LENGTH, BPF_JGE, R(5), LABEL_UNCHARGED);
    SUBTRACT(R(5), LENGTH);
    ADD(R(4), R(5));
    HERE(LABEL_UNCHARGED);
    STORE32(FLOW, OF_FLOW(charge), R(4));
    /* User space learns of it once. */
    LOAD32(R(1), FLOW, OF_FLOW(is_told));
    GOTO_IF_NUMBER(R(1), BPF_JNE, 0, LABEL_LEAVE);
    write_tell(w, places);
    GOTO_IF_NUMBER(R(0), BPF_JNE, 0, LABEL_LEAVE);
    SET(R(1), 1);
    STORE32(FLOW, OF_FLOW(is_told), R(1));
    HERE(LABEL_LEAVE);
    SET(R(0), SK_PASS);
    EXIT();
    HERE(LABEL_BROKEN);
    /* There was no memory to trim it. User space sees it when it is told, or looks. */
    SET(R(1), FLOW_BROKEN);
    STORE32(FLOW, OF_FLOW(mode), R(1));
    write_tell(w, places);
    HERE(LABEL_DROP);
    SET(R(0), SK_DROP);
    EXIT();
}

uint32_t kecho_write_program(struct bpf_insn *program, const struct kecho_program_places *places) {
    struct writer writer = {.program = program};
    write_beginning(&writer, places);
    write_trim(&writer, places);
    write_echo(&writer, places);
    write_pass(&writer, places);
    resolve(&writer);
    return writer.count;
}

/* ---- the filter -------------------------------------------------------------------------- */

#define KEEP_ALL (-1)
#define TCP_DATA_OFFSET 12 /* of the byte whose upper half is the header's length in words */

uint32_t kecho_write_filter(struct bpf_insn *program, const struct kecho_program_places *places) {
    struct writer writer = {.program = program};
    struct writer *w = &writer;
    MOVE(SKB, R(1));
    write_lookup(w, places);
    LOAD32(R(1), FLOW, OF_FLOW(mode));
    GOTO_IF_NUMBER(R(1), BPF_JNE, FLOW_PASSED, LABEL_LEAVE);
    write_tcp_sock(w);
    /* Segments without data are never in the way. */
    MOVE(R(1), SKB);
    SET(R(2), TCP_DATA_OFFSET);
    MOVE(R(3), R(10));
    ADD_NUMBER(R(3), BYTE);
    SET(R(4), 1);
    CALL(skb_load_bytes);
    GOTO_IF_NUMBER(R(0), BPF_JNE, 0, LABEL_LEAVE);
    LOAD8(R(1), R(10), BYTE);
    AND_NUMBER(R(1), 0xf0);
    SHIFT_RIGHT(R(1), 2);
    LOAD32(LENGTH, SKB, offsetof(struct __sk_buff, len));
    GOTO_IF(LENGTH, BPF_JLE, R(1), LABEL_LEAVE);
    /* More than the receive buffer holds? Not while what is passed is charged. */
    write_unread(w, places);
    LOAD32(R(2), TCP, places->sk_rcvbuf);
    GOTO_IF(R(1), BPF_JGT, R(2), LABEL_DROP);
    /* Too many small skbs, and those of the epoch before not all read? */
    LOAD32(R(2), FLOW, OF_FLOW(charge));
    LOAD32(R(3), FLOW, OF_FLOW(charge_before));
    ADD(R(2), R(3));
    GOTO_IF_NUMBER(R(2), BPF_JLE, KECHO_PASSED_CHARGE_MOST, LABEL_LEAVE);
    LOAD64(R(2), FLOW, OF_FLOW(passed));
    SUBTRACT(R(2), R(1));
    LOAD64(R(3), FLOW, OF_FLOW(mark));
    GOTO_IF(R(2), BPF_JSLT, R(3), LABEL_DROP);
    HERE(LABEL_LEAVE);
    SET(R(0), KEEP_ALL);
    EXIT();
    HERE(LABEL_DROP);
    SET(R(0), 0);
    EXIT();
    resolve(w);
    return writer.count;
}
