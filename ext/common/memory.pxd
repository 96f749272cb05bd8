"""Memory in whole cache lines; free() gives it back."""
from common.errors cimport system_error
from libc.errno cimport ENOMEM
from libc.string cimport memset

cdef extern from "common/memory.h" nogil:
    enum:
        KECHO_CACHE_LINE

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t alignment_bytes, size_t size_bytes)


cdef inline void* cache_lines(size_t size, bint zeroed=True) except NULL:
    """For the .pyx files, which hold the GIL. Raises OSError."""
    size = (size + KECHO_CACHE_LINE - 1) // KECHO_CACHE_LINE * KECHO_CACHE_LINE
    cdef void* memory = aligned_alloc(KECHO_CACHE_LINE, max(size, <size_t>KECHO_CACHE_LINE))
    if memory == NULL:
        raise system_error(ENOMEM, "aligned_alloc")
    if zeroed:
        memset(memory, 0, size)
    return memory
