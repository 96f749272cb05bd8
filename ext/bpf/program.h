/* The program that the kernel runs for each skb that has come in on a flow: which bytes go back at
 * once and which are left to user space. */
#ifndef KECHO_BPF_PROGRAM_H
#define KECHO_BPF_PROGRAM_H

#include <linux/bpf.h>
#include <stdint.h>

#define KECHO_PROGRAM_MOST 160 /* instructions */

/* What stands in the program as numbers. */
struct kecho_program_places {
    int32_t sockets_fd; /* SOCKHASH: cookie -> socket */
    int32_t flows_fd;   /* HASH: cookie -> struct kecho_flow */
    int32_t board_fd;   /* ARRAY of one struct kecho_flow_board */
    int32_t ring_fd;    /* RINGBUF of tokens */
    /* In struct tcp_sock, and in struct sock, which it begins with. */
    int16_t bytes_acked, write_seq, snd_una, rcv_nxt, copied_seq;
    int16_t sk_sndbuf, sk_wmem_queued;
};

/* Writes the program; returns how many instructions it has. */
uint32_t kecho_write_program(struct bpf_insn *program, const struct kecho_program_places *places);

#endif
