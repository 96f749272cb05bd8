"""kecho.server._sandbox: how a process gives up what it will not need again.

Each function acts on the calling thread, and on the threads that it starts from then on. None of
it can be undone. Each raises OSError that names the system call.
"""
from common.errors cimport system_error
from kernel.capability cimport (
    _LINUX_CAPABILITY_U32S_3, _LINUX_CAPABILITY_VERSION_3, __user_cap_data_struct,
    __user_cap_header_struct,
)
from kernel.filter cimport sock_filter, sock_fprog
from kernel.landlock cimport (
    CREATE_RULESET_VERSION, FS_IOCTL_DEV, FS_OF_ABI_1, FS_REFER, FS_REMOVE_FILE, FS_TRUNCATE,
    NET_BIND_TCP, NET_CONNECT_TCP, RULE_PATH_BENEATH, SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL,
    PathBeneath, Ruleset,
)
from kernel.prctl cimport (
    PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, PR_CAPBSET_DROP, PR_GET_NO_NEW_PRIVS,
    PR_SET_NO_NEW_PRIVS, prctl,
)
from kernel.seccomp cimport (
    SECCOMP_FILTER_FLAG_SPEC_ALLOW, SECCOMP_FILTER_FLAG_TSYNC, SECCOMP_SET_MODE_FILTER,
)
from kernel.syscall cimport (
    KEYCTL_JOIN_SESSION_KEYRING, SYS_capget, SYS_capset, SYS_keyctl, SYS_landlock_add_rule,
    SYS_landlock_create_ruleset, SYS_landlock_restrict_self, SYS_seccomp, syscall,
)
from libc.errno cimport EINVAL, ENOSYS, EPERM, ESRCH, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport close
from sandbox.filter cimport INSTRUCTIONS_MOST, write_filter
from sandbox.policy cimport (
    KECHO_AUDIT_ARCH, KECHO_IS_SANITIZED, KECHO_PERMITS, KECHO_PERMITS_OF_A_FILE,
    KECHO_PERMITS_OF_DATAGRAMS, KECHO_PERMITS_OF_FLOWS, kecho_permits, kecho_permits_of_a_file,
    kecho_permits_of_datagrams, kecho_permits_of_flows,
)

cdef extern from "<dlfcn.h>":
    enum:
        RTLD_NOW
    void* dlopen(const char* name, int flags)


IS_SANITIZED = bool(KECHO_IS_SANITIZED)

# The numbers of the calls that are allowed, under some condition at least.
PERMITTED_CALLS = frozenset(kecho_permits[i].call for i in range(KECHO_PERMITS))
PERMITTED_CALLS_OF_A_FILE = frozenset(
    kecho_permits_of_a_file[i].call for i in range(KECHO_PERMITS_OF_A_FILE)
)
PERMITTED_CALLS_OF_DATAGRAMS = frozenset(
    kecho_permits_of_datagrams[i].call for i in range(KECHO_PERMITS_OF_DATAGRAMS)
)
PERMITTED_CALLS_OF_FLOWS = frozenset(
    kecho_permits_of_flows[i].call for i in range(KECHO_PERMITS_OF_FLOWS)
)

cdef enum:
    CAPABILITIES_MOST = 64


def load_unwinder():
    """pthread_exit() of glibc opens this library when it is first called, and aborts without it:
    Python calls it in threads that outlive the interpreter. Where there is none, none is needed."""
    dlopen(b"libgcc_s.so.1", RTLD_NOW)


def set_no_new_privileges():
    """execve() gives this thread no privileges any more: prctl(2). What refuses the call does not
    matter if it was so before."""
    cdef int number
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0:
        number = errno
        if prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1:
            raise system_error(number, "prctl(PR_SET_NO_NEW_PRIVS)")


def leave_session_keyring():
    """For a new one, which is empty: keyctl(2). A thread keeps its session's keyring, and may read
    the keys in it, whoever it becomes. ENOSYS, EPERM: there are no keyrings, or somebody (the
    filter of a container) refuses every use of them."""
    if syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0:
        if errno != ENOSYS and errno != EPERM:
            raise system_error(errno, "keyctl(KEYCTL_JOIN_SESSION_KEYRING)")


def drop_bounding_set():
    """No execve() gives these capabilities back: capabilities(7). Needs CAP_SETPCAP; without it,
    nothing changes."""
    cdef int number
    for number in range(CAPABILITIES_MOST):
        if prctl(PR_CAPBSET_DROP, number, 0, 0, 0) < 0:
            if errno == EINVAL or errno == EPERM:  # the last one there is; not allowed
                return
            raise system_error(errno, "prctl(PR_CAPBSET_DROP)")


def drop_capabilities():
    """Empties the effective, permitted, inheritable and ambient sets: capset(2). A call that is
    refused does not matter if they are empty."""
    cdef __user_cap_header_struct header
    cdef __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3]
    cdef int number = 0
    header.version = _LINUX_CAPABILITY_VERSION_3
    header.pid = 0
    memset(data, 0, sizeof(data))
    # The kernel keeps the ambient set within the others, which are about to be empty.
    if prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 and errno != EINVAL:
        number = errno
        if not has_no_capabilities():
            raise system_error(number, "prctl(PR_CAP_AMBIENT)")
    if syscall(SYS_capset, &header, data) < 0:
        number = errno
        if not has_no_capabilities():
            raise system_error(number, "capset")


cdef bint has_no_capabilities() noexcept:
    """Effective, permitted and inheritable; ambient ones are among them: capget(2)."""
    cdef __user_cap_header_struct header
    cdef __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3]
    cdef int i
    header.version = _LINUX_CAPABILITY_VERSION_3
    header.pid = 0
    if syscall(SYS_capget, &header, data) < 0:
        return False
    for i in range(_LINUX_CAPABILITY_U32S_3):
        if data[i].effective or data[i].permitted or data[i].inheritable:
            return False
    return True


# ---- Landlock --------------------------------------------------------------------------------


def landlock_abi():
    """The version of Landlock that this kernel has. OSError: ENOSYS without, EOPNOTSUPP off."""
    cdef long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, CREATE_RULESET_VERSION)
    if abi < 0:
        raise system_error(errno, "landlock_create_ruleset")
    return abi


def restrict_access(int abi, int removable_fd):
    """No file can be opened, made, changed or run, no TCP connection begun, no TCP port bound, no
    signal sent and no abstract Unix socket reached outside this process: as far as version `abi` of
    Landlock knows how.

    removable_fd: a directory beneath which files may be removed, or -1.
    """
    cdef Ruleset ruleset
    cdef PathBeneath beneath
    cdef int fd
    memset(&ruleset, 0, sizeof(ruleset))
    ruleset.handled_access_fs = FS_OF_ABI_1
    if abi >= 2:
        ruleset.handled_access_fs |= <uint64_t>FS_REFER
    if abi >= 3:
        ruleset.handled_access_fs |= <uint64_t>FS_TRUNCATE
    if abi >= 4:
        ruleset.handled_access_net = NET_BIND_TCP | NET_CONNECT_TCP
    if abi >= 5:
        ruleset.handled_access_fs |= <uint64_t>FS_IOCTL_DEV
    if abi >= 6:
        ruleset.scoped = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL
    # A kernel that knows a shorter struct takes this one as long as the rest is zero.
    fd = <int>syscall(SYS_landlock_create_ruleset, &ruleset, sizeof(ruleset), 0)
    if fd < 0:
        raise system_error(errno, "landlock_create_ruleset")
    try:
        if removable_fd >= 0:
            beneath.allowed_access = FS_REMOVE_FILE
            beneath.parent_fd = removable_fd
            if syscall(SYS_landlock_add_rule, fd, RULE_PATH_BENEATH, &beneath, 0) < 0:
                raise system_error(errno, "landlock_add_rule(LANDLOCK_RULE_PATH_BENEATH)")
        if syscall(SYS_landlock_restrict_self, fd, 0) < 0:
            raise system_error(errno, "landlock_restrict_self")
    finally:
        close(fd)


# ---- seccomp ---------------------------------------------------------------------------------


def filter_program(*, bint for_a_file, bint for_datagrams, bint for_flows, bint for_rings):
    """What filter_calls() has the kernel run, as bytes: struct sock_filter, one after the other."""
    cdef sock_filter program[INSTRUCTIONS_MOST]
    cdef uint32_t size = write_filter(program, for_a_file, for_datagrams, for_flows, for_rings)
    return (<char*>program)[:size * sizeof(sock_filter)]


def filter_calls(**options):
    """Only the system calls of policy.h from now on; EPERM for any other.

    for_a_file: also those that remove a Unix socket's file. for_datagrams: also those that serve
    UDP. for_flows: also those that hand connections to the kernel's echo. for_rings: also those
    that use rings. ENOSYS: no seccomp, or no policy for this architecture.
    """
    cdef bytes program = filter_program(**options)
    cdef sock_fprog described
    # Speculation is left as it is (which is the default since Linux 5.16): what a switch of its
    # mitigations at every turn would protect is a process without secrets of anybody.
    cdef unsigned int flags = SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_SPEC_ALLOW
    cdef long result
    if KECHO_AUDIT_ARCH == 0:
        raise OSError(ENOSYS, "seccomp: there is no list of calls for this architecture")
    described.len = <unsigned short>(len(program) // sizeof(sock_filter))
    described.filter = <sock_filter*><char*>program
    result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &described)
    if result < 0 and errno == EINVAL:  # Linux 4.16 and older
        flags = SECCOMP_FILTER_FLAG_TSYNC
        result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &described)
    if result < 0:
        raise system_error(errno, "seccomp")
    if result > 0:
        raise OSError(ESRCH, f"seccomp: thread {result} has filters of its own")
