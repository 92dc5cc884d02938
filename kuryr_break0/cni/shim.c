/* SPDX-License-Identifier: Apache-2.0
 *
 * The CNI plugin break0 for hosts without Python. It sends the CNI_ variables
 * and the standard input to the agent's socket, and writes the answer. See
 * kuryr_break0/agent/cni_server.py for the agent's side.
 *
 *   request:  NAME=VALUE, NUL, for each variable; NUL; the input; end of file
 *   answer:   exit status, blank, bytes of the output, line feed; the output
 */
#define _GNU_SOURCE /* O_PATH */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SOCKET "/run/kuryr-break0/cni.sock"
/* Seconds until the shim gives up. On a loaded node, the first ADD can need
 * more than ten seconds, and kubelet gives a sandbox two minutes. The tests
 * build a shim with a shorter time.
 */
#ifndef PATIENCE
#define PATIENCE 60
#endif
#define TEXT_OF(number) #number
#define SECONDS(number) TEXT_OF(number) " seconds"
#define LIMIT (1 << 20) /* maximum bytes of input, and of output */
#define LONGEST 4096 /* maximum bytes of a path, as PATH_MAX */
#define SEE_LOG ". See the log of the agent: journalctl -u kuryr-break0-agent"
#define SUPPORTED "\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\""

extern char **environ;
static char input[LIMIT + 2], answer[LIMIT + 64];
static char version[16] = "1.1.0";
static char path[LONGEST] = SOCKET;

static long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int fail(int code, const char *what, const char *where, const char *why)
{
    printf("{\"cniVersion\": \"%s\", \"code\": %d, \"msg\": \"%s", version,
           code, what);
    for (; *where; where++)
        putchar(*where < ' ' || strchr("\"\\\x7f", *where) ? '?' : *where);
    printf("%s\"}\n", why);
    fflush(stdout);
    return 1;
}

/* Return whether a descriptor becomes ready before the deadline. */
static int ready(int fd, short events, long deadline)
{
    struct pollfd p = {.fd = fd, .events = events};
    long left;
    while ((left = deadline - now()) > 0) {
        int n = poll(&p, 1, left);
        if (n > 0)
            return 1;
        if (n < 0 && errno != EINTR)
            return 0;
    }
    errno = ETIMEDOUT;
    return 0;
}

/* Read at most size bytes until the end of file. Return their number, or -1
 * after an error or the deadline.
 */
static long take(int fd, char *to, long size, long deadline)
{
    long n, have = 0;
    while (have < size) {
        if (!ready(fd, POLLIN, deadline))
            return -1;
        n = read(fd, to + have, size - have);
        if (n == 0)
            break;
        if (n < 0 && errno != EINTR && errno != EAGAIN)
            return -1;
        have += n > 0 ? n : 0;
    }
    return have;
}

static int give(int fd, const char *from, long size, long deadline)
{
    long n;
    while (size > 0) {
        if (!ready(fd, POLLOUT, deadline))
            return -1;
        n = write(fd, from, size);
        if (n < 0 && errno != EINTR && errno != EAGAIN)
            return -1;
        from += n > 0 ? n : 0;
        size -= n > 0 ? n : 0;
    }
    return 0;
}

static const char *blank(const char *at)
{
    return at + strspn(at, " \t\r\n");
}

/* Return the value of a key of the outermost object, or NULL. */
static const char *value_of(const char *json, const char *key)
{
    int depth = 0;
    const char *start, *at;
    for (at = json; *at; at++) {
        if (*at == '{' || *at == '[')
            depth++;
        else if (*at == '}' || *at == ']')
            depth--;
        else if (*at == '"') {
            for (start = ++at; *at && *at != '"'; at++)
                if (*at == '\\' && at[1])
                    at++;
            if (!*at)
                return NULL;
            if (depth == 1 && *blank(at + 1) == ':' &&
                (size_t)(at - start) == strlen(key) &&
                !strncmp(start, key, at - start))
                return blank(blank(at + 1) + 1);
        }
    }
    return NULL;
}

/* Copy a JSON string. Return -1 if the value is not a string, has escapes, or
 * is too long.
 */
static int text_of(const char *value, char *to, size_t size)
{
    size_t length = value && *value == '"' ? strcspn(value + 1, "\"\\") : size;
    if (length >= size || value[length + 1] != '"')
        return -1;
    memcpy(to, value + 1, length);
    to[length] = 0;
    return 0;
}

static int call(int fd, long size, long deadline)
{
    char **variable;
    for (variable = environ; *variable; variable++)
        if (!strncmp(*variable, "CNI_", 4) &&
            give(fd, *variable, strlen(*variable) + 1, deadline))
            return -1;
    if (give(fd, "", 1, deadline) || give(fd, input, size, deadline))
        return -1;
    return shutdown(fd, SHUT_WR);
}

/* Connect to the agent. The address of a socket has at most 108 bytes, so a
 * longer path is replaced by /proc/self/fd/N/NAME.
 */
static int reach(int fd)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    char *name = strrchr(path, '/');
    int directory;
    if (strlen(path) < sizeof(to.sun_path)) {
        strcpy(to.sun_path, path);
        return connect(fd, (void *)&to, sizeof(to));
    }
    *name = 0;
    directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    *name = '/';
    if (directory < 0)
        return -1;
    if ((size_t)snprintf(to.sun_path, sizeof(to.sun_path), "/proc/self/fd/%d%s",
                         directory, name) >= sizeof(to.sun_path)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    return connect(fd, (void *)&to, sizeof(to));
}

int main(void)
{
    const char *value, *command = getenv("CNI_COMMAND");
    long size, deadline = now() + PATIENCE * 1000, length;
    int fd, status, start;
    char found[sizeof(version)];

    signal(SIGPIPE, SIG_IGN);
    size = take(0, input, LIMIT + 1, deadline);
    if (size < 0)
        return fail(5, "Cannot read the input: ", strerror(errno), "");
    if (size > LIMIT)
        return fail(6, "The input has more than 1 MiB", "", "");
    value = value_of(input, "cniVersion");
    if (!text_of(value, found, sizeof(found)) &&
        strspn(found, "0123456789.") == strlen(found) && *found)
        strcpy(version, found);
    value = value_of(input, "socket");
    if (value && (text_of(value, path, sizeof(path)) || *path != '/'))
        return fail(7, "socket must be an absolute path of less than 4096 "
                    "bytes", "", "");
    value = value_of(input, "strict");
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || reach(fd)) {
        if (command && !strcmp(command, "STATUS") &&
            !(value && !strncmp(value, "true", 4)))
            return 0; /* an error would make the node NotReady */
        if (command && !strcmp(command, "VERSION") &&
            (!size || *blank(input) == '{')) {
            printf("{\"cniVersion\": \"%s\", \"supportedVersions\": [%s]}\n",
                   version, SUPPORTED);
            return 0;
        }
        fprintf(stderr, "break0: %s: %s\n", path, strerror(errno));
        return fail(11, "The agent of kuryr-break0 does not listen on ",
                    path, ". Start it, for example: systemctl start "
                    "kuryr-break0-agent");
    }
    /* Ignore an error: if the agent refused the request, its answer has the
     * reason.
     */
    call(fd, size, deadline);
    size = take(fd, answer, sizeof(answer) - 1, deadline);
    if (size < 0 && errno == ETIMEDOUT)
        return fail(11, "The agent of kuryr-break0 has not answered within "
                    SECONDS(PATIENCE) " on ", path, SEE_LOG);
    if (size < 0 || sscanf(answer, "%d %ld\n%n", &status, &length, &start) != 2
        || size - start != length)
        return fail(11, "The agent of kuryr-break0 closed the connection "
                    "before the end of its answer on ", path, SEE_LOG);
    if (give(1, answer + start, length, deadline))
        return 1;
    return status;
}
