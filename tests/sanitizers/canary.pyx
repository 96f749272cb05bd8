"""Planted bugs: each one must make a sanitizer build of this module fail."""

cdef extern from * nogil:
    """
    #include <limits.h>
    #include <sched.h>
    #include <stdlib.h>

    /* volatile: at -O1 the compiler would otherwise fold the bugs away. */
    static long shared;

    static int overflow_heap(volatile size_t size) {
        volatile char *volatile block = (volatile char *)calloc(size, 1);
        int beyond = block[size];
        free((void *)block);
        return beyond;
    }

    static int use_after_free(volatile size_t size) {
        volatile char *volatile block = (volatile char *)calloc(size, 1);
        free((void *)block);
        return block[0];
    }

    static int overflow_signed(volatile int amount) {
        return INT_MAX + amount;
    }

    static void leak(volatile size_t size) {
        void *volatile block = malloc(size);
        block = NULL;
        (void)block;
    }

    /* Both threads must be here at once: one that came after the other would have taken over
     * the GIL from it, which orders their accesses. Relaxed: arriving orders nothing. */
    static void race(volatile int rounds) {
        static int arrived;
        __atomic_add_fetch(&arrived, 1, __ATOMIC_RELAXED);
        while (__atomic_load_n(&arrived, __ATOMIC_RELAXED) < 2)
            sched_yield();
        for (int i = 0; i < rounds; i++)
            *(volatile long *)&shared += 1;
    }
    """
    int c_overflow_heap "overflow_heap"(size_t size)
    int c_use_after_free "use_after_free"(size_t size)
    int c_overflow_signed "overflow_signed"(int amount)
    void c_leak "leak"(size_t size)
    void c_race "race"(int rounds)


def nothing():
    """The control: no bug, must pass."""


def heap_overflow():
    """Read one byte behind a heap block."""
    return c_overflow_heap(16)


def use_after_free():
    """Read a freed heap block."""
    return c_use_after_free(16)


def signed_overflow():
    """Add one to INT_MAX."""
    return c_overflow_signed(1)


def leak():
    """Lose heap blocks; several, as a stale register may still hold the last."""
    for _ in range(8):
        c_leak(1000)


def bump(int rounds):
    """Add to a plain shared word without the GIL."""
    with nogil:
        c_race(rounds)


def data_race():
    """Two threads at once in bump()."""
    import threading
    threads = [threading.Thread(target=bump, args=(1000000,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
