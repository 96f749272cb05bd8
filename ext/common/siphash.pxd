"""A keyed hash for tables whose keys strangers choose. siphash.h says which."""
from libc.stdint cimport uint64_t

cdef extern from "common/siphash.h" nogil:
    ctypedef struct HashKey "struct kecho_hash_key":
        uint64_t* words

    int hash_key_draw "kecho_hash_key_draw"(HashKey* key)
    uint64_t siphash "kecho_siphash"(const HashKey* key, uint64_t first, uint64_t second)
