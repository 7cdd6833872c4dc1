# recvmmsg(2), sendmmsg(2), sendmsg(2), writev(2) and clocks, for the compiled loops.

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t writev(int descriptor, const iovec *vector, int count)

cdef extern from "sys/socket.h" nogil:
    struct msghdr:
        void *msg_name
        unsigned int msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    int MSG_DONTWAIT
    ssize_t send(int descriptor, const void *data, size_t count, int flags)
    ssize_t sendmsg(int descriptor, const msghdr *message, int flags)
    int sendmmsg(int descriptor, mmsghdr *messages, unsigned int count, int flags)
    int recvmmsg(int descriptor, mmsghdr *messages, unsigned int count, int flags, void *timeout)

cdef extern from "unistd.h" nogil:
    ssize_t read(int descriptor, void *data, size_t count)

cdef extern from "sys/epoll.h" nogil:
    union epoll_data:
        int fd
    struct epoll_event:
        unsigned int events
        epoll_data data
    int epoll_wait(int epoll, epoll_event *events, int count, int milliseconds)

cdef extern from "time.h" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_REALTIME
    int CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *now)
    int nanosleep(const timespec *wanted, timespec *left)

cdef extern from *:
    """
    #define load_acquire(at) __atomic_load_n((unsigned int *) (at), __ATOMIC_ACQUIRE)
    #define store_release(at, value) __atomic_store_n((unsigned int *) (at), (value), __ATOMIC_RELEASE)
    """
    # Words that the kernel writes, too.
    unsigned int load_acquire(const unsigned char *at) nogil
    void store_release(unsigned char *at, unsigned int value) nogil
