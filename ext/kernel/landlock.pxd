"""<linux/landlock.h>: landlock(7), in all versions of its ABI up to 8.

Written out here: distributions' headers are older than the kernels that they meet.
"""
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    enum {
        KECHO_LANDLOCK_CREATE_RULESET_VERSION = 1,
        KECHO_LANDLOCK_RULE_PATH_BENEATH = 1,

        KECHO_LANDLOCK_FS_REMOVE_FILE = 1 << 5,
        KECHO_LANDLOCK_FS_OF_ABI_1 = (1 << 13) - 1,
        KECHO_LANDLOCK_FS_REFER = 1 << 13,     /* ABI 2, Linux 5.19 */
        KECHO_LANDLOCK_FS_TRUNCATE = 1 << 14,  /* ABI 3, Linux 6.2 */
        KECHO_LANDLOCK_FS_IOCTL_DEV = 1 << 15, /* ABI 5, Linux 6.10 */

        KECHO_LANDLOCK_NET_BIND_TCP = 1, /* ABI 4, Linux 6.7 */
        KECHO_LANDLOCK_NET_CONNECT_TCP = 2,

        KECHO_LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET = 1, /* ABI 6, Linux 6.12 */
        KECHO_LANDLOCK_SCOPE_SIGNAL = 2
    };
    struct kecho_landlock_ruleset_attr {
        uint64_t handled_access_fs;
        uint64_t handled_access_net; /* zero, or the kernel has ABI 4 */
        uint64_t scoped;             /* zero, or ABI 6 */
    };
    struct kecho_landlock_path_beneath_attr {
        uint64_t allowed_access;
        int32_t parent_fd;
    } __attribute__((packed));
    """
    enum:
        CREATE_RULESET_VERSION "KECHO_LANDLOCK_CREATE_RULESET_VERSION"
        RULE_PATH_BENEATH "KECHO_LANDLOCK_RULE_PATH_BENEATH"
        FS_REMOVE_FILE "KECHO_LANDLOCK_FS_REMOVE_FILE"
        FS_OF_ABI_1 "KECHO_LANDLOCK_FS_OF_ABI_1"
        FS_REFER "KECHO_LANDLOCK_FS_REFER"
        FS_TRUNCATE "KECHO_LANDLOCK_FS_TRUNCATE"
        FS_IOCTL_DEV "KECHO_LANDLOCK_FS_IOCTL_DEV"
        NET_BIND_TCP "KECHO_LANDLOCK_NET_BIND_TCP"
        NET_CONNECT_TCP "KECHO_LANDLOCK_NET_CONNECT_TCP"
        SCOPE_ABSTRACT_UNIX_SOCKET "KECHO_LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET"
        SCOPE_SIGNAL "KECHO_LANDLOCK_SCOPE_SIGNAL"

    ctypedef struct Ruleset "struct kecho_landlock_ruleset_attr":
        uint64_t handled_access_fs
        uint64_t handled_access_net
        uint64_t scoped

    ctypedef struct PathBeneath "struct kecho_landlock_path_beneath_attr":
        uint64_t allowed_access
        int32_t parent_fd
