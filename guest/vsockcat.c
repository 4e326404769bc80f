/*
 * vsockcat: standard input and output on a vsock connection, for guests whose busybox has no vsock.
 *
 *     vsockcat connect CID PORT
 *     vsockcat listen PORT         one connection, from anywhere
 *
 * Each direction ends by itself: the end of stdin half-closes the connection, its end closes stdout. Status 1 on any error.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void copy(int from, int to)
{
    static char buffer[1 << 16];
    ssize_t got;

    while ((got = read(from, buffer, sizeof buffer)) > 0)
        for (ssize_t done = 0, put; done < got; done += put)
            if ((put = write(to, buffer + done, got - done)) < 0)
                fail("write");
    if (got < 0)
        fail("read");
}

int main(int count, char **words)
{
    struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0), status = 1;

    if (fd < 0)
        fail("socket");
    if (count == 4 && !strcmp(words[1], "connect")) {
        address.svm_cid = strtoul(words[2], NULL, 10);
        address.svm_port = strtoul(words[3], NULL, 10);
        if (connect(fd, (struct sockaddr *)&address, sizeof address))
            fail("connect");
    } else if (count == 3 && !strcmp(words[1], "listen")) {
        address.svm_port = strtoul(words[2], NULL, 10);
        if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1))
            fail("listen");
        fputs("listening\n", stderr);
        if ((fd = accept(fd, NULL, NULL)) < 0)
            fail("accept");
    } else {
        fputs("vsockcat connect CID PORT | listen PORT\n", stderr);
        return 1;
    }

    pid_t sender = fork();
    if (sender < 0)
        fail("fork");
    if (sender == 0) {
        copy(0, fd);
        if (shutdown(fd, SHUT_WR))
            fail("shutdown");
        return 0;
    }
    copy(fd, 1);
    close(1);
    waitpid(sender, &status, 0);
    return status != 0;
}
