"""Streams: connections that had more to read when their turn was over.

A worker keeps some of them and gives them turns between two waits. So a client that sends a request
and waits is answered before a stream goes on. The first stream may have many turns in a row, which
only costs other streams time. This makes streams cheap: its socket gets empty, and what arrives
next is read while the CPU's caches still hold it. Taking streams in turn would read the bytes that
have waited for longest.
"""
from engine.layout cimport KECHO_STREAMS_MOST, Connection, Worker
from libc.stdint cimport uint32_t


cdef enum:
    TURNS_IN_A_CIRCLE = 64  # of all streams that a worker keeps


cdef inline bint stream_keep(Worker* worker, Connection* connection) noexcept nogil:
    """Keep a connection that the worker owns, behind the others. Return False if there is no place.
    """
    worker.stream_turns += 1
    if worker.stream_count == KECHO_STREAMS_MOST:
        return False
    worker.streams[worker.stream_count] = connection
    worker.stream_count += 1
    return True


cdef inline Connection* stream_take(Worker* worker) noexcept nogil:
    """Remove the first stream and return it."""
    cdef Connection* connection = worker.streams[0]
    cdef uint32_t i
    worker.turns_in_a_row = 0
    worker.stream_count -= 1
    for i in range(worker.stream_count):
        worker.streams[i] = worker.streams[i + 1]
    return connection


cdef inline bint stream_has_had_its_turns(Worker* worker) noexcept nogil:
    """Check whether the first stream must make way for the others."""
    return (
        worker.stream_count > 1
        and worker.turns_in_a_row * worker.stream_count >= TURNS_IN_A_CIRCLE)


cdef inline void stream_count_turn(Worker* worker) noexcept nogil:
    """Count a turn of the first stream."""
    if worker.turns_in_a_row < TURNS_IN_A_CIRCLE:
        worker.turns_in_a_row += 1
