// Reads 4 KiB after another from a disk, past the page cache, and tells the longest time between two completions.
//
// usage: pulse DEVICE. SIGUSR1: prints "LONGEST microseconds", and begins anew. SIGTERM: the same, and ends. A read
// that fails ends it with "FAIL".

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t asked, ended;

static void on_signal(int number) {
    if (number == SIGTERM)
        ended = 1;
    asked = 1;
}

static long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

int main(int argc, char **argv) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    int fd = argc == 2 ? open(argv[1], O_RDONLY | O_DIRECT) : -1;
    void *block;
    long long last, longest = 0;
    unsigned long reads = 0;

    if (fd < 0 || posix_memalign(&block, 4096, 4096) != 0) {
        printf("FAIL: pulse cannot open the disk: %s\n", strerror(errno));
        return 1;
    }
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    last = now_us();
    while (!ended) {
        // 16 MiB, over and over.
        if (pread(fd, block, 4096, (off_t)(reads++ % 4096) * 4096) != 4096) {
            printf("FAIL: pulse: read: %s\n", strerror(errno));
            return 1;
        }
        long long now = now_us();
        if (now - last > longest)
            longest = now - last;
        if (asked) {
            asked = 0;
            printf("LONGEST %lld\n", longest);
            fflush(stdout);
            longest = 0;
        }
        // The pause between two reads is not the disk's.
        usleep(500);
        last = now_us();
    }
    return 0;
}
