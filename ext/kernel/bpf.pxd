"""<linux/bpf.h>: bpf(2), the commands of it that kecho uses."""
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <linux/bpf.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    static inline int kecho_bpf(int command, union bpf_attr *attr, size_t size) {
        int result = (int)syscall(SYS_bpf, command, attr, size);
        return result < 0 ? -errno : result;
    }

    static inline int bpf_map_create(uint32_t kind, uint32_t key_bytes, uint32_t value_bytes,
                                     uint32_t entries, uint32_t flags) {
        union bpf_attr attr;
        memset(&attr, 0, sizeof(attr));
        attr.map_type = kind;
        attr.key_size = key_bytes;
        attr.value_size = value_bytes;
        attr.max_entries = entries;
        attr.map_flags = flags;
        return kecho_bpf(BPF_MAP_CREATE, &attr, sizeof(attr));
    }

    static inline int kecho_bpf_element(int command, int map_fd, const void *key, void *value) {
        union bpf_attr attr;
        memset(&attr, 0, sizeof(attr));
        attr.map_fd = (uint32_t)map_fd;
        attr.key = (uint64_t)(uintptr_t)key;
        attr.value = (uint64_t)(uintptr_t)value;
        return kecho_bpf(command, &attr, sizeof(attr));
    }

    static inline int bpf_map_lookup(int map_fd, const void *key, void *value) {
        return kecho_bpf_element(BPF_MAP_LOOKUP_ELEM, map_fd, key, value);
    }

    static inline int bpf_map_update(int map_fd, const void *key, const void *value) {
        return kecho_bpf_element(BPF_MAP_UPDATE_ELEM, map_fd, key, (void *)(uintptr_t)value);
    }

    static inline int bpf_map_delete(int map_fd, const void *key) {
        return kecho_bpf_element(BPF_MAP_DELETE_ELEM, map_fd, key, NULL);
    }

    /* The license decides which functions of the kernel a program may call. EAGAIN: a signal came
     * while the program was looked at, be it only to have the kernel's own work done. */
    static inline int bpf_prog_load(uint32_t kind, uint32_t attach_type, const char *name,
                                    const struct bpf_insn *program, uint32_t count, char *log,
                                    uint32_t log_bytes) {
        union bpf_attr attr;
        int result, tries = 10;
        memset(&attr, 0, sizeof(attr));
        attr.prog_type = kind;
        attr.expected_attach_type = attach_type;
        attr.insns = (uint64_t)(uintptr_t)program;
        attr.insn_cnt = count;
        attr.license = (uint64_t)(uintptr_t)"GPL";
        attr.log_buf = (uint64_t)(uintptr_t)log;
        attr.log_size = log_bytes;
        attr.log_level = log != NULL;
        strncpy(attr.prog_name, name, BPF_OBJ_NAME_LEN - 1);
        do {
            result = kecho_bpf(BPF_PROG_LOAD, &attr, sizeof(attr));
        } while (result == -EAGAIN && --tries > 0);
        return result;
    }

    static inline int bpf_prog_attach(int target_fd, int program_fd, uint32_t attach_type) {
        union bpf_attr attr;
        memset(&attr, 0, sizeof(attr));
        attr.target_fd = (uint32_t)target_fd;
        attr.attach_bpf_fd = (uint32_t)program_fd;
        attr.attach_type = attach_type;
        return kecho_bpf(BPF_PROG_ATTACH, &attr, sizeof(attr));
    }
    """
    enum:
        BPF_F_MMAPABLE
        BPF_F_NO_PREALLOC
        BPF_MAP_TYPE_ARRAY
        BPF_MAP_TYPE_HASH
        BPF_MAP_TYPE_RINGBUF
        BPF_MAP_TYPE_SOCKHASH
        BPF_PROG_TYPE_SK_SKB
        BPF_PROG_TYPE_SOCKET_FILTER
        BPF_RINGBUF_BUSY_BIT
        BPF_RINGBUF_DISCARD_BIT
        BPF_RINGBUF_HDR_SZ
        BPF_SK_SKB_STREAM_VERDICT

    struct bpf_insn:
        pass

    # Each returns what bpf(2) does, or -errno.
    int bpf_map_create(
        uint32_t kind, uint32_t key_bytes, uint32_t value_bytes, uint32_t entries,
        uint32_t flags)
    int bpf_map_lookup(int map_fd, const void* key, void* value)
    int bpf_map_update(int map_fd, const void* key, const void* value)
    int bpf_map_delete(int map_fd, const void* key)
    int bpf_prog_load(
        uint32_t kind, uint32_t attach_type, const char* name, const bpf_insn* program,
        uint32_t count, char* log, uint32_t log_bytes)
    int bpf_prog_attach(int target_fd, int program_fd, uint32_t attach_type)
