/* Where a member of one of the kernel's structures lies, and what its functions are called, by the
 * type information (BTF) that the kernel describes itself with: Documentation/bpf/btf.rst. */
#ifndef KECHO_BPF_BTF_H
#define KECHO_BPF_BTF_H

#include <stddef.h>
#include <stdint.h>

/* The offset in bytes of a direct member, or -ENOENT: no such structure or member; -EINVAL: the
 * `size` bytes at `data` are no BTF of this machine's. */
int kecho_btf_offset(const uint8_t *data, size_t size, const char *structure, const char *member);

/* The id of a function, by which a program calls it; errors as above. */
int kecho_btf_function(const uint8_t *data, size_t size, const char *function);

#endif
