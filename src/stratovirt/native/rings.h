/* What the C side knows of a virtqueue: rings.c has the words. */
#ifndef STRATOVIRT_NATIVE_RINGS_H
#define STRATOVIRT_NATIVE_RINGS_H

#include "native.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define MAX_REGIONS 8
#define MAX_VECTOR 1024 /* IOV_MAX: pieces of memory in one system call */

/* Why a function came to its end, as in __init__.py. For ODD it is Python's turn: with a chain, or an error, that is out of
 * the ordinary. */
enum { DONE, EMPTY, ODD, FULL, SHORT, HOPELESS };

struct region {
    uint64_t base, size; /* guest-physical */
    uint8_t *host;
    Py_buffer buffer; /* holds the mapping */
    PyObject *view;   /* all of it */
};

#define REQUEST_FIELDS 12

struct ring {
    PyObject_HEAD
    unsigned size;
    bool event_idx, indirect;
    const uint8_t *table;
    const uint16_t *avail; /* flags, idx, ring[size], used_event */
    uint16_t *used;        /* flags, idx, {u32 id, u32 len} ring[size], avail_event */
    unsigned last;         /* the region that was found last */
    unsigned regions;
    struct region region[MAX_REGIONS];
    PyObject *request_type; /* that disk.c makes instances of, and where in them its fields are */
    Py_ssize_t request_field[REQUEST_FIELDS];
};

/* A chain, as pieces of memory: first those that the driver wrote for us, then those that we write. */
struct chain {
    uint16_t head;
    int readable, writable; /* pieces */
    uint64_t readable_bytes, writable_bytes;
};

int ring_available(const struct ring *ring, uint16_t position);
bool ring_walk(struct ring *ring, uint16_t position, struct iovec *vector, int room, struct chain *chain);
bool ring_ask(const struct ring *ring, uint16_t position);
void ring_fill(const struct ring *ring, uint16_t position, uint16_t head, uint32_t written);
void ring_publish(const struct ring *ring, uint16_t position);

/* Bytes in and out of pieces, from the byte `from` on; the caller knows that they are there. */
void vector_read(const struct iovec *vector, size_t from, void *to, size_t length);
void vector_write(const struct iovec *vector, size_t at, const void *from, size_t length);
/* Leave the first `length` bytes out: pieces that are wholly left out, `*vector` begins behind them. */
int vector_skip(struct iovec *vector, size_t length);

PyObject *serve_disk(PyObject *self, PyObject *arguments);
PyObject *take_requests(PyObject *self, PyObject *arguments);
PyObject *receive_frames(PyObject *self, PyObject *arguments);
PyObject *send_frames(PyObject *self, PyObject *arguments);
int rings_set_up(PyObject *module);

#endif
