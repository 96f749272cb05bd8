"""Streams: connections that had more to read when their turn was over.

A worker that keeps some gives the first of them a turn between two looks for events, so that who
asks and waits is answered before any stream goes on. The first one can have many turns in a row
then, at nobody's expense but other streams'. That is what makes streams cheap: its socket gets
empty, and what comes into it from then on is read while the CPU's caches still have it, where one
turn for each in a circle reads what has waited for longest.
"""
from engine.layout cimport KECHO_STREAMS_MOST, Connection, Worker
from libc.stdint cimport uint32_t


cdef enum:
    TURNS_IN_A_ROW = 16


cdef inline bint stream_keep(Worker* worker, Connection* connection) noexcept nogil:
    """Keeps a connection that the worker owns. False: there is no place."""
    if worker.stream_count == KECHO_STREAMS_MOST:
        worker.is_crowded = True
        return False
    if worker.stream_count == 0:
        worker.turns_left = TURNS_IN_A_ROW
    worker.streams[worker.stream_count] = connection
    worker.stream_count += 1
    return True


cdef inline Connection* stream_take(Worker* worker) noexcept nogil:
    """The first one, which is kept no longer."""
    cdef Connection* connection = worker.streams[0]
    cdef uint32_t i
    worker.turns_left = TURNS_IN_A_ROW
    worker.stream_count -= 1
    for i in range(worker.stream_count):
        worker.streams[i] = worker.streams[i + 1]
    return connection
