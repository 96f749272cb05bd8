"""<sys/syscall.h>: calls that the C library has no function for."""

cdef extern from *:
    """
    #include <linux/keyctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    /* The same on every architecture; headers before Linux 5.13 do not know them. */
    #ifndef SYS_landlock_create_ruleset
    #define SYS_landlock_create_ruleset 444
    #define SYS_landlock_add_rule 445
    #define SYS_landlock_restrict_self 446
    #endif
    """
    enum:
        KEYCTL_JOIN_SESSION_KEYRING
        SYS_capget
        SYS_capset
        SYS_keyctl
        SYS_landlock_add_rule
        SYS_landlock_create_ruleset
        SYS_landlock_restrict_self
        SYS_seccomp

    long syscall(long number, ...)
