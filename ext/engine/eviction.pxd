"""max_buffer_memory: who is closed when clients that do not read pin more than that."""
from engine.backpressure cimport note_progress, untaken, waiting_claim_slowest, waiting_is_over
from engine.connection cimport connection_close, connection_let_go
from engine.layout cimport CLOSE_EVICTED, Connection, Worker


cdef enum:
    SPARED_MOST = 64  # readers, in one search for one that is not


cdef inline bint evict_slowest(Worker* worker) noexcept nogil:
    """Closes the connections longest without progress until the queue's buffers are within their
    bounds. False when those that are left are being served, by this worker or another.

    A client that reads, but too little for epoll to report it, is spared, a number of times.
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
