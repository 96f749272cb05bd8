"""Streams: connections that had more to read when their turn was over.

A worker that keeps some gives them turns between two looks for events, so that who asks and waits
is answered before any stream goes on. The first of them can have many turns in a row then, at
nobody's expense but other streams'. That is what makes streams cheap: its socket gets empty, and
what comes into it from then on is read while the CPU's caches still have it, where a turn for each
in a circle reads what has waited for longest.
"""
from engine.layout cimport KECHO_STREAMS_MOST, Connection, Worker
from libc.stdint cimport uint32_t


cdef enum:
    TURNS_IN_A_CIRCLE = 64  # of all that a worker keeps


cdef inline bint stream_keep(Worker* worker, Connection* connection) noexcept nogil:
    """Keeps a connection that the worker owns, behind the others. False: there is no place."""
    worker.stream_turns += 1
    if worker.stream_count == KECHO_STREAMS_MOST:
        return False
    worker.streams[worker.stream_count] = connection
    worker.stream_count += 1
    return True


cdef inline Connection* stream_take(Worker* worker) noexcept nogil:
    """The first one, which is kept no longer."""
    cdef Connection* connection = worker.streams[0]
    cdef uint32_t i
    worker.turns_in_a_row = 0
    worker.stream_count -= 1
    for i in range(worker.stream_count):
        worker.streams[i] = worker.streams[i + 1]
    return connection


cdef inline bint stream_has_had_its_turns(Worker* worker) noexcept nogil:
    """The first one, while others wait."""
    return (
        worker.stream_count > 1
        and worker.turns_in_a_row * worker.stream_count >= TURNS_IN_A_CIRCLE)


cdef inline void stream_count_turn(Worker* worker) noexcept nogil:
    if worker.turns_in_a_row < TURNS_IN_A_CIRCLE:
        worker.turns_in_a_row += 1
