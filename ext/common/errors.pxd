"""Errors as Python sees them: for the .pyx files, which hold the GIL."""
from libc.string cimport strerror


cdef inline object system_error(int error, str call):
    """An OSError that names the system call."""
    return OSError(error, f"{call}: {strerror(error).decode('utf-8', 'replace')}")
