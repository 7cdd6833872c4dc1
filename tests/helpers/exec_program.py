"""A C program that speaks PF_KEY, ``ipsecq exec`` around it, and a PF_KEY server for it."""

import os
import queue
import select
import subprocess
import sys
import threading
import time

from ipsecq.pfkey.memory import MemoryDatabase
from ipsecq.pfkey.server import PfkeyServer
from ipsecq.pfkey.socket_server import PfkeySocketServer

PROBE = r"""
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <linux/pfkeyv2.h>

static int open_key(int flags) { return socket(PF_KEY, SOCK_RAW | flags, PF_KEY_V2); }

static void *speak(void *unused) {
    struct sadb_msg m = { PF_KEY_V2, SADB_REGISTER, 0, SADB_SATYPE_ESP, 2, 0, 7, getpid() }, h;
    char buffer[65536];
    int fd = open_key(0);
    if (fd < 0) { printf("socket: %s\n", strerror(errno)); return NULL; }
    if (send(fd, &m, sizeof m, 0) != sizeof m) { perror("send"); return NULL; }
    if (recv(fd, &h, sizeof h, MSG_PEEK) != sizeof h) { perror("peek"); return NULL; }
    ssize_t n = recv(fd, buffer, sizeof buffer, 0);
    printf("type %d errno %d whole %d\n", h.sadb_msg_type, h.sadb_msg_errno, n == h.sadb_msg_len * 8 && n > 100);
    m.sadb_msg_type = SADB_DUMP; m.sadb_msg_satype = 0;
    send(fd, &m, sizeof m, 0);
    do n = recv(fd, &h, sizeof h, 0); while (n > 0 && h.sadb_msg_type != SADB_DUMP);
    printf("dump errno %d\n", h.sadb_msg_errno);
    fflush(stdout);
    return NULL;
}

int main(int argc, char **argv) {
    const char *how = argv[1];
    if (!strcmp(how, "speak")) speak(NULL);
    else if (!strcmp(how, "thread")) { pthread_t t; pthread_create(&t, NULL, speak, NULL); pthread_join(t, NULL); }
    else if (!strcmp(how, "children")) {
        for (int i = 0; i < 4; i++) if (!fork()) { speak(NULL); return 0; }
        while (wait(NULL) > 0);
    } else if (!strcmp(how, "daemon")) {
        if (fork()) return 3;
        setsid(); usleep(400000);
        freopen(argv[2], "w", stdout);
        speak(NULL);
    } else if (!strcmp(how, "flags")) {
        int a = open_key(0), b = open_key(SOCK_CLOEXEC | SOCK_NONBLOCK);
        printf("%d %d %d %d\n", fcntl(a, F_GETFD) & FD_CLOEXEC, !!(fcntl(a, F_GETFL) & O_NONBLOCK),
               fcntl(b, F_GETFD) & FD_CLOEXEC, !!(fcntl(b, F_GETFL) & O_NONBLOCK));
        printf("%d %d\n", socket(PF_KEY, SOCK_DGRAM, PF_KEY_V2) < 0 ? errno : 0,
               socket(PF_KEY, SOCK_RAW, 1) < 0 ? errno : 0);
    } else if (!strcmp(how, "option")) {
        unsigned char value[64]; unsigned n = 0, x;
        while (n < sizeof value && sscanf(argv[2] + 2 * n, "%2x", &x) == 1) value[n++] = x;
        int fd = socket(AF_INET, SOCK_DGRAM, 0), six = socket(AF_INET6, SOCK_DGRAM, 0), on = 1;
        struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
        bind(fd, (void *)&at, sizeof at);
        printf("%d ", setsockopt(fd, IPPROTO_IP, 16, value, n) ? errno : 0);
        printf("%d ", setsockopt(six, IPPROTO_IPV6, 34, value, n) ? errno : 0);
        printf("%d ", setsockopt(fd, IPPROTO_IP, 16, (void *)8, n) ? errno : 0);
        printf("%d ", setsockopt(99, IPPROTO_IP, 16, value, n) ? errno : 0);
        printf("%d ", setsockopt(0, IPPROTO_IP, 16, value, n) ? errno : 0);
        printf("%d ", setsockopt(fd, IPPROTO_IP, 16, value, 100000) ? errno : 0);
        printf("%d\n", setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ? errno : 0);
    } else if (!strcmp(how, "impatient")) {
        struct sadb_msg m = { PF_KEY_V2, SADB_REGISTER, 0, SADB_SATYPE_ESP, 2, 0, 7, getpid() };
        int fd = open_key(0), pipes[2];
        struct pollfd key = { fd, POLLIN, 0 }, other = { 0, POLLIN, 0 };
        pipe(pipes); other.fd = pipes[0];
        send(fd, &m, sizeof m, 0);
        printf("%d ", poll(&key, 1, 1));
        printf("%d\n", poll(&other, 1, 1));
    } else if (!strcmp(how, "hasty")) {
        /* As racoon: it never waits for a reply. */
        for (int way = 0; way < 4; way++) {
            struct sadb_msg m = { PF_KEY_V2, SADB_REGISTER, 0, SADB_SATYPE_ESP, 2, 0, 7, getpid() }, h;
            struct iovec pieces[2] = { { &m, 8 }, { (char *)&m + 8, sizeof m - 8 } };
            struct msghdr whole = { .msg_iov = pieces, .msg_iovlen = 2 };
            char buffer[65536];
            int fd = open_key(0);
            fcntl(fd, F_SETFL, O_NONBLOCK);
            ssize_t n = way == 0 ? send(fd, &m, sizeof m, 0) : way == 1 ? write(fd, &m, sizeof m)
                      : way == 2 ? writev(fd, pieces, 2) : sendmsg(fd, &whole, MSG_NOSIGNAL);
            ssize_t peeked = recv(fd, &h, sizeof h, MSG_PEEK | MSG_DONTWAIT);
            if (peeked < 0) printf("%s ", strerror(errno));
            ssize_t got = read(fd, buffer, sizeof buffer);
            printf("%zd %zd %d %d\n", n, peeked, got > 100, got > 0 && recv(fd, buffer, sizeof buffer, 0) < 0);
        }
    } else if (!strcmp(how, "reader")) {
        /* Somebody else takes the reply from the socket. */
        struct sadb_msg m = { PF_KEY_V2, SADB_REGISTER, 0, SADB_SATYPE_ESP, 2, 0, 7, getpid() };
        char buffer[65536];
        int fd = open_key(0);
        pid_t child = fork();
        if (!child) _exit(recv(fd, buffer, sizeof buffer, 0) > 100 ? 7 : 1);
        printf("%zd ", send(fd, &m, sizeof m, 0));
        int status;
        waitpid(child, &status, 0);
        printf("%d\n", WEXITSTATUS(status));
    } else if (!strcmp(how, "others")) {
        /* Other files in the place of PF_KEY sockets, and more of these than there are places. */
        int pipes[2], last = -1, low = 0;
        char octet;
        pipe(pipes);
        dup2(pipes[1], atoi(argv[2]));
        printf("%zd ", write(atoi(argv[2]), "x", 1));
        printf("%zd ", read(pipes[0], &octet, 1));
        for (int i = 0; i < 80; i++) { last = open_key(0); low += last >= 0 && last < atoi(argv[2]) - 63; }
        printf("%d %d\n", last >= 0, low);
        speak(NULL);
    } else if (!strcmp(how, "polls")) {
        int pipes[2];
        pipe(pipes);
        struct pollfd other = { pipes[0], POLLIN, 0 };
        for (int i = 0; i < 100; i++) poll(&other, 1, 1);
        printf("polled\n"); fflush(stdout);
        getchar();
    } else if (!strcmp(how, "exit")) return atoi(argv[2]);
    else if (!strcmp(how, "die")) raise(atoi(argv[2]));
    else if (!strcmp(how, "catch")) {
        sigset_t set; int got;
        sigemptyset(&set); sigaddset(&set, SIGTERM); sigaddset(&set, SIGHUP); sigaddset(&set, SIGUSR1);
        sigprocmask(SIG_BLOCK, &set, NULL);
        printf("ready\n"); fflush(stdout);
        for (int i = 0; i < 2; i++) { sigwait(&set, &got); printf("%d\n", got); fflush(stdout); }
        return 5;
    } else if (!strcmp(how, "calls")) {
        for (int i = 0; i < 200000; i++) { int fd = socket(AF_UNIX, SOCK_DGRAM, 0); close(fd); }
    }
    fflush(stdout);
    return 0;
}
"""

RUN = """
import json, sys
from pathlib import Path
from ipsecq.errors import IpsecqError
from ipsecq.pfkey.exec import run
log = sys.argv[2]
def hook(request):
    try: name = request.socket.getsockname()
    except OSError as error: return error.errno
    with open(log, "a") as out:
        print(json.dumps([request.level, request.option, request.value.hex(), request.socket.family, list(name[:2]),
                          request.privileged]), file=out)
    return 0 if request.level == 0 else 1
try:
    run(sys.argv[3:], Path(sys.argv[1]), None if log == "-" else hook)
except IpsecqError as error:
    print(error, file=sys.stderr)
    sys.exit(100)
"""


def command(path, *argv, log="-"):
    return [sys.executable, "-c", RUN, str(path), str(log), *map(str, argv)]


def run(path, *argv, log="-", **more):
    words = command(path, *argv, log=log)
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, **more)


class Server:
    """A PF_KEY server over real databases in a thread."""

    def __init__(self, path, barrier=None):
        self.path, self.database, self.jobs = path, MemoryDatabase(), queue.SimpleQueue()
        self.server = PfkeyServer(self.database, time.time, lambda n: int.from_bytes(os.urandom(8), "big") % n)
        self.sockets = PfkeySocketServer(self.server, barrier)
        self.sockets.listen(path)
        self.wake_read, self.wake_write = os.pipe()
        self.thread = threading.Thread(target=self._loop)
        self.thread.start()

    def _loop(self):
        poll = select.poll()
        poll.register(self.sockets.fileno(), select.POLLIN)
        poll.register(self.wake_read, select.POLLIN)
        while True:
            if self.wake_read in [fd for fd, _ in poll.poll(1000)]:
                if os.read(self.wake_read, 1) == b"x":
                    return
                self.jobs.get()(self.sockets)
            self.sockets.on_readable()
            self.sockets.send(self.server.tick())

    def call(self, job):
        """Run ``job(sockets)`` in the server's thread, as an event of the daemon would."""
        self.jobs.put(job)
        os.write(self.wake_write, b"j")

    def close(self):
        os.write(self.wake_write, b"x")
        self.thread.join()
        self.sockets.close()
        os.close(self.wake_read)
        os.close(self.wake_write)
