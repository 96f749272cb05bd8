#include "bpf/btf.h"

#include <errno.h>
#include <linux/btf.h>
#include <stdbool.h>
#include <string.h>

struct text {
    const char *begin;
    size_t size;
};

static bool is_named(struct text names, uint32_t offset, const char *name) {
    size_t length = strlen(name) + 1;
    return offset < names.size && names.size - offset >= length &&
           memcmp(names.begin + offset, name, length) == 0;
}

/* What stands behind a `struct btf_type`, in bytes; -1: a kind that is not known here. */
static long more_bytes(const struct btf_type *type) {
    long count = BTF_INFO_VLEN(type->info);
    switch (BTF_INFO_KIND(type->info)) {
    case BTF_KIND_INT:
    case BTF_KIND_VAR:
    case 17: /* BTF_KIND_DECL_TAG */
        return 4;
    case BTF_KIND_ARRAY:
        return sizeof(struct btf_array);
    case BTF_KIND_STRUCT:
    case BTF_KIND_UNION:
        return count * (long)sizeof(struct btf_member);
    case BTF_KIND_ENUM:
        return count * (long)sizeof(struct btf_enum);
    case BTF_KIND_FUNC_PROTO:
        return count * (long)sizeof(struct btf_param);
    case BTF_KIND_DATASEC:
    case 19: /* BTF_KIND_ENUM64: a name and two words each, as long */
        return count * (long)sizeof(struct btf_var_secinfo);
    case BTF_KIND_PTR:
    case BTF_KIND_FWD:
    case BTF_KIND_TYPEDEF:
    case BTF_KIND_VOLATILE:
    case BTF_KIND_CONST:
    case BTF_KIND_RESTRICT:
    case BTF_KIND_FUNC:
    case 16: /* BTF_KIND_FLOAT */
    case 18: /* BTF_KIND_TYPE_TAG */
        return 0;
    default:
        return -1;
    }
}

static int offset_in(const struct btf_type *type, struct text names, const char *member) {
    const struct btf_member *members = (const struct btf_member *)(type + 1);
    uint32_t i, bits;
    for (i = 0; i < BTF_INFO_VLEN(type->info); i++) {
        if (is_named(names, members[i].name_off, member)) {
            bits = BTF_INFO_KFLAG(type->info) ? BTF_MEMBER_BIT_OFFSET(members[i].offset)
                                              : members[i].offset;
            return (int)(bits / 8);
        }
    }
    return -ENOENT;
}

/* Walks to the type of this kind and name; `found` is NULL if there is none. Returns its id, or
 * -EINVAL. */
static int find(const uint8_t *data, size_t size, uint32_t kind, const char *name,
                const struct btf_type **found, struct text *names) {
    struct btf_header header;
    const struct btf_type *type;
    const uint8_t *at, *end;
    long more;
    int id = 0;
    *found = NULL;
    if (size < sizeof(header))
        return -EINVAL;
    memcpy(&header, data, sizeof(header));
    if (header.magic != BTF_MAGIC || header.hdr_len < sizeof(header) || header.hdr_len > size)
        return -EINVAL;
    data += header.hdr_len;
    size -= header.hdr_len;
    if (header.type_off > size || header.type_len > size - header.type_off ||
        header.str_off > size || header.str_len > size - header.str_off ||
        ((uintptr_t)data + header.type_off) % 4 != 0)
        return -EINVAL;
    names->begin = (const char *)data + header.str_off;
    names->size = header.str_len;
    at = data + header.type_off;
    end = at + header.type_len;
    while (at < end) {
        type = (const struct btf_type *)at;
        if ((size_t)(end - at) < sizeof(*type))
            return -EINVAL;
        more = more_bytes(type);
        if (more < 0 || more > end - at - (long)sizeof(*type))
            return -EINVAL;
        id++;
        if (BTF_INFO_KIND(type->info) == kind && is_named(*names, type->name_off, name)) {
            *found = type;
            return id;
        }
        at += (long)sizeof(*type) + more;
    }
    return 0;
}

int kecho_btf_offset(const uint8_t *data, size_t size, const char *structure, const char *member) {
    const struct btf_type *type;
    struct text names;
    int id = find(data, size, BTF_KIND_STRUCT, structure, &type, &names);
    if (id < 0)
        return id;
    return type == NULL ? -ENOENT : offset_in(type, names, member);
}

int kecho_btf_function(const uint8_t *data, size_t size, const char *function) {
    const struct btf_type *type;
    struct text names;
    int id = find(data, size, BTF_KIND_FUNC, function, &type, &names);
    return id == 0 ? -ENOENT : id;
}
