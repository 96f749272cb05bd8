"""<netinet/in.h>, <endian.h> and <linux/udp.h>: ip(7), ipv6(7), udp(7), endian(3)."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from * nogil:
    """
    #include <arpa/inet.h>
    #include <endian.h>
    #include <netinet/in.h>
    #ifndef SOL_UDP
    #define SOL_UDP 17
    #endif
    #ifndef UDP_SEGMENT
    #define UDP_SEGMENT 103 /* Linux 4.18 */
    #endif
    #ifndef UDP_GRO
    #define UDP_GRO 104 /* Linux 5.0 */
    #endif
    """
    enum:
        AF_INET
        AF_INET6
        IPPROTO_IP
        IPPROTO_IPV6
        IPV6_HOPLIMIT
        IPV6_PKTINFO
        IP_PKTINFO
        IP_TTL
        SOL_UDP
        UDP_GRO
        UDP_SEGMENT

    struct in_addr:
        uint32_t s_addr

    struct in6_addr:
        uint8_t[16] s6_addr

    struct sockaddr_in:
        uint16_t sin_port
        in_addr sin_addr

    struct sockaddr_in6:
        uint16_t sin6_port
        in6_addr sin6_addr
        uint32_t sin6_scope_id

    struct sockaddr_storage:
        pass

    struct in_pktinfo:
        int ipi_ifindex
        in_addr ipi_spec_dst
        in_addr ipi_addr

    struct in6_pktinfo:
        in6_addr ipi6_addr
        unsigned int ipi6_ifindex

    uint16_t ntohs(uint16_t port)
    uint32_t ntohl(uint32_t address)
    uint64_t be64toh(uint64_t number)
    bint IN6_IS_ADDR_LINKLOCAL(const in6_addr* address)
    bint IN6_IS_ADDR_MULTICAST(const in6_addr* address)
    bint IN6_IS_ADDR_UNSPECIFIED(const in6_addr* address)
