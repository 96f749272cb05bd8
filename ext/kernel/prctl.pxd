"""<sys/prctl.h>: prctl(2)."""

cdef extern from "<sys/prctl.h>":
    enum:
        PR_CAPBSET_DROP
        PR_CAP_AMBIENT
        PR_CAP_AMBIENT_CLEAR_ALL
        PR_GET_NO_NEW_PRIVS
        PR_SET_NO_NEW_PRIVS

    int prctl(int operation, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
