/* What the kernel runs for a flow. The program: for each skb that TCP has received; which bytes go
 * back at once and which are left to user space. The filter: for each packet before TCP sees it;
 * while what was redirected has not been sent, what is passed waits behind it in a queue that is
 * charged to nobody and closes no window, so that only a loss can hold a sender back. */
#ifndef KECHO_BPF_PROGRAM_H
#define KECHO_BPF_PROGRAM_H

#include <linux/bpf.h>
#include <stdint.h>

#define KECHO_PROGRAM_MOST 256 /* instructions */

/* What stands in the program as numbers. */
struct kecho_program_places {
    int32_t sockets_fd; /* SOCKHASH: cookie -> socket */
    int32_t flows_fd;   /* HASH: cookie -> struct kecho_flow */
    int32_t board_fd;   /* ARRAY of one struct kecho_flow_board */
    int32_t reports_fd; /* RINGBUF of tokens */
    /* In struct tcp_sock, and in struct sock, which it begins with. */
    int16_t bytes_acked, write_seq, snd_una, rcv_nxt, copied_seq;
    int16_t sk_sndbuf, sk_wmem_queued, sk_rcvbuf;
    int16_t seq;                  /* in struct sk_buff: of its struct tcp_skb_cb */
    int32_t bpf_cast_to_kern_ctx; /* id of that function: the struct sk_buff of the context */
};

/* Each returns how many instructions it has written. */
uint32_t kecho_write_program(struct bpf_insn *program, const struct kecho_program_places *places);
uint32_t kecho_write_filter(struct bpf_insn *program, const struct kecho_program_places *places);

#endif
