"""max_buffer_memory: close connections whose client stops reading when buffers exceed the bound."""
from engine.backpressure cimport note_progress, untaken, waiting_claim_slowest, waiting_is_over
from engine.connection cimport connection_close, connection_let_go
from engine.layout cimport CLOSE_EVICTED, Connection, Worker


cdef enum:
    SPARED_MOST = 64


cdef inline bint evict_slowest(Worker* worker) noexcept nogil:
    """Close the connections without progress for the longest time until the queue's buffers are
    within their bound. Return False if all that are left are being served.

    A client that reads, but so little that epoll does not report it, is spared, up to SPARED_MOST
    times in one call.
    """
    cdef Connection* slowest
    cdef int spared = 0
    while waiting_is_over(worker.queue, worker.control):
        slowest = waiting_claim_slowest(worker.queue)
        if slowest == NULL:
            return False
        if spared < SPARED_MOST and untaken(worker, slowest) != slowest.unread_bytes:
            spared += 1
            note_progress(worker, slowest)
            connection_let_go(worker, slowest)
        else:
            connection_close(worker, slowest, CLOSE_EVICTED)
    return True
