// Shows pages that a migration left behind.
//
// The disk writes into memory that this program touched before the migration began, and that no processor has touched
// since: O_DIRECT. Only the backend can tell QEMU that those pages have to be sent once more.
//
// usage: stale DEVICE MIB, with orders on standard input, one a line:
//   read     reads the first MIB of the disk over the buffer, whose pages hold something else so far
//   calm     stops writing to the memory that keeps a migration from ending
//   compare  reads the same into other memory, and tells how many sectors of 512 bytes differ: "STALE n of m"

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { CHUNK = 1 << 18, RESTLESS = 24 << 20 };

static atomic_int calm;

static char *memory(size_t size) {
    char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        printf("FAIL: stale: no memory\n");
        exit(1);
    }
    return at;
}

static void read_disk(int fd, char *to, size_t size) {
    for (size_t at = 0; at < size; at += CHUNK) {
        if (pread(fd, to + at, CHUNK, (off_t)at) != CHUNK) {
            printf("FAIL: stale: read\n");
            exit(1);
        }
    }
}

// Keeps writing to memory, faster than a slow migration sends it.
static void *restless(void *unused) {
    volatile char *at = memory(RESTLESS);
    for (unsigned char value = 1; !atomic_load(&calm); value++) {
        for (size_t i = 0; i < RESTLESS && !atomic_load(&calm); i += 4096)
            at[i] = (char)value;
        usleep(1000);
    }
    return unused;
}

int main(int argc, char **argv) {
    int fd = argc == 3 ? open(argv[1], O_RDONLY | O_DIRECT) : -1;
    size_t size = argc == 3 ? (size_t)atoi(argv[2]) << 20 : 0, stale = 0;
    char *buffer, *fresh, order[32];
    pthread_t thread;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (fd < 0 || size == 0) {
        printf("FAIL: stale: no disk\n");
        return 1;
    }
    buffer = memory(size);
    fresh = memory(CHUNK);
    memset(buffer, 0xa5, size);
    pthread_create(&thread, NULL, restless, NULL);
    printf("READY\n");
    while (fgets(order, sizeof order, stdin)) {
        if (strcmp(order, "read\n") == 0) {
            read_disk(fd, buffer, size);
            printf("READ\n");
        } else if (strcmp(order, "calm\n") == 0) {
            atomic_store(&calm, 1);
            pthread_join(thread, NULL);
            printf("CALM\n");
        } else if (strcmp(order, "compare\n") == 0) {
            for (size_t at = 0; at < size; at += CHUNK) {
                if (pread(fd, fresh, CHUNK, (off_t)at) != CHUNK) {
                    printf("FAIL: stale: read\n");
                    return 1;
                }
                for (size_t i = 0; i < CHUNK; i += 512)
                    stale += memcmp(buffer + at + i, fresh + i, 512) != 0;
            }
            printf("STALE %zu of %zu\n", stale, size / 512);
            return 0;
        }
    }
    return 1;
}
