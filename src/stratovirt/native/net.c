/* Frames between a tap and the queues of a network interface: what `virtio/net_receive.py` and `net_send.py` do.
 *
 * A frame is one system call, straight from or into the driver's buffers. Receiving has no buffers at hand from one call to the
 * next: it looks at those available anew each time, and takes only those that it fills. A frame for which there are too few is put
 * together in the caller's spill, until there are more.
 */
#include "rings.h"

#include <errno.h>
#include <string.h>

#define HEADER_SIZE 12
#define NUM_BUFFERS_AT 10
#define ETHERNET_HEADER 14
#define MAX_FRAME (ETHERNET_HEADER + 4 + 65535)
#define HEAD_SIZE 16 /* of a frame, for the filter: addresses, type, VLAN */

/* -- receiving */

struct receiver {
    struct ring *ring;
    int fd, limit;
    bool mergeable;
    size_t wanted; /* room for most frames, with the header */
    uint8_t *spill;
    size_t spill_size, held;
    bool everything;    /* is wanted */
    const uint8_t *mac; /* or plain frames for this address, if there is one */
    PyObject *accepts;  /* decides about all others */
    uint16_t next_avail, next_used;

    /* Buffers at hand: chains [next_avail, looked), pieces [first, end) of the vector. */
    uint16_t looked;
    int first, end;
    size_t room;
    struct {
        uint16_t head, pieces;
        uint32_t bytes;
    } chain[MAX_VECTOR];          /* by position, modulo */
    struct iovec vector[MAX_VECTOR + 1]; /* one behind the driver's is for the spill */
};

/* Look at more chains until there is room for `wanted` bytes. DONE, SHORT (a refill will be notified), or ODD. */
static int look(struct receiver *to, size_t wanted)
{
    struct ring *ring = to->ring;
    uint16_t most = to->mergeable ? (uint16_t)ring->size : 1;

    while (to->room < wanted) {
        struct chain chain;
        int available;

        if ((uint16_t)(to->looked - to->next_avail) >= most)
            return SHORT;
        available = ring_available(ring, to->next_avail);
        if (available < 0)
            return ODD;
        if (available == (uint16_t)(to->looked - to->next_avail)) {
            if (!ring_ask(ring, to->looked))
                return SHORT;
            continue;
        }
        if (to->first) { /* those before it have been used */
            memmove(to->vector, to->vector + to->first, sizeof to->vector[0] * (size_t)(to->end - to->first));
            to->end -= to->first;
            to->first = 0;
        }
        if (!ring_walk(ring, to->looked, to->vector + to->end, MAX_VECTOR - 1 - to->end, &chain) || chain.readable ||
            chain.writable_bytes < HEADER_SIZE || chain.writable_bytes > UINT32_MAX)
            return ODD;
        to->chain[to->looked % MAX_VECTOR].head = chain.head;
        to->chain[to->looked % MAX_VECTOR].pieces = (uint16_t)chain.writable;
        to->chain[to->looked % MAX_VECTOR].bytes = (uint32_t)chain.writable_bytes;
        to->room += chain.writable_bytes;
        to->end += chain.writable;
        to->looked++;
    }
    return DONE;
}

/* Does the driver want the frame that lies in the buffers? Called without the GIL. */
static bool wants(const struct receiver *to, size_t length)
{
    uint8_t head[HEAD_SIZE];
    size_t have = length - HEADER_SIZE < HEAD_SIZE ? length - HEADER_SIZE : HEAD_SIZE;
    PyGILState_STATE state;
    PyObject *answer;
    bool wanted;

    if (to->everything)
        return true;
    vector_read(to->vector + to->first, HEADER_SIZE, head, have);
    if (to->mac != NULL && have >= ETHERNET_HEADER && memcmp(head, to->mac, 6) == 0 && (head[12] != 0x81 || head[13] != 0x00))
        return true;
    state = PyGILState_Ensure();
    answer = PyObject_CallFunction(to->accepts, "y#", (char *)head, (Py_ssize_t)have);
    wanted = answer != NULL && PyObject_IsTrue(answer) > 0;
    if (PyErr_Occurred()) /* what has been delivered must be told to the caller: this goes another way */
        PyErr_WriteUnraisable(to->accepts);
    Py_XDECREF(answer);
    PyGILState_Release(state);
    return wanted;
}

/* Give the driver the `length` bytes that lie in the buffers at hand. */
static void deliver(struct receiver *to, size_t length)
{
    uint16_t count = 0, first_used = to->next_used;
    struct iovec *buffers = to->vector + to->first;

    while (length) {
        uint32_t bytes = to->chain[to->next_avail % MAX_VECTOR].bytes;
        size_t part = length < bytes ? length : bytes;

        ring_fill(to->ring, to->next_used++, to->chain[to->next_avail % MAX_VECTOR].head, (uint32_t)part);
        to->first += to->chain[to->next_avail % MAX_VECTOR].pieces;
        to->room -= bytes;
        to->next_avail++;
        length -= part;
    }
    count = to->next_used - first_used;
    vector_write(buffers, NUM_BUFFERS_AT, &count, sizeof count);
    ring_publish(to->ring, to->next_used);
}

static int receive(struct receiver *to)
{
    for (; to->limit > 0; to->limit--) {
        size_t length = to->held, direct = 0;
        int found = look(to, length ? length : to->wanted);

        if (found == ODD)
            return ODD;
        if (!length) {
            ssize_t got;

            if (to->looked == to->next_avail)
                return SHORT;
            direct = to->room;
            to->vector[to->end] = (struct iovec){to->spill, to->spill_size};
            got = readv(to->fd, to->vector + to->first, to->end - to->first + 1);
            if (got < 0 && errno != EAGAIN)
                return ODD;
            if (got <= HEADER_SIZE)
                return EMPTY;
            length = (size_t)got;
            if (!wants(to, length))
                continue;
            found = look(to, length);
        }
        if (length > to->room) {
            uint16_t chains = to->looked - to->next_avail;

            if (chains && (!to->mergeable || chains >= to->ring->size)) {
                to->held = 0;
                to->limit--;
                return HOPELESS;
            }
            if (!to->held) { /* all of it into the spill, behind each other */
                memmove(to->spill + direct, to->spill, length - direct);
                vector_read(to->vector + to->first, 0, to->spill, direct);
                to->held = length;
            }
            return found;
        }
        if (length > direct)
            vector_write(to->vector + to->first, direct, to->spill, length - direct);
        to->held = 0;
        deliver(to, length);
    }
    return DONE;
}

/* receive_frames(fd, next_avail, next_used, mergeable, wanted, spill, held, mac, accepts, limit)
 *     -> (chains that were used, held, what is left of the limit, why it ended)
 * `spill` takes what the driver has no room for, MAX_FRAME and more; `held`: so many bytes in it are a frame that waits.
 * SHORT: the driver is asked to notify when it has more buffers. HOPELESS: a frame was dropped, for which it can never have enough. */
PyObject *receive_frames(PyObject *self, PyObject *arguments)
{
    struct receiver to;
    Py_buffer spill;
    Py_ssize_t wanted, held, mac_size;
    const char *mac;
    int mergeable, why;
    unsigned short next_avail;

    to.ring = (struct ring *)self;
    if (!PyArg_ParseTuple(arguments, "iHHpnw*nz#Oi", &to.fd, &to.next_avail, &to.next_used, &mergeable, &wanted, &spill, &held,
                          &mac, &mac_size, &to.accepts, &to.limit))
        return NULL;
    if (spill.len < HEADER_SIZE + MAX_FRAME || held < 0 || held > spill.len || (mac_size != 0 && mac_size != 6)) {
        PyBuffer_Release(&spill);
        return PyErr_Format(PyExc_ValueError, "no such receiver");
    }
    to.mergeable = mergeable;
    to.wanted = (size_t)wanted;
    to.spill = spill.buf;
    to.spill_size = (size_t)spill.len;
    to.held = (size_t)held;
    to.everything = mac != NULL && mac_size == 0;
    to.mac = mac_size ? (const uint8_t *)mac : NULL;
    to.looked = next_avail = to.next_avail;
    to.first = to.end = 0;
    to.room = 0;
    Py_BEGIN_ALLOW_THREADS
    why = receive(&to);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&spill);
    return Py_BuildValue("inii", (uint16_t)(to.next_avail - next_avail), (Py_ssize_t)to.held, to.limit, why);
}

/* -- sending */

struct header { /* struct virtio_net_hdr_v1 */
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};
_Static_assert(sizeof(struct header) == HEADER_SIZE, "struct virtio_net_hdr_v1");

#define NEEDS_CSUM 1
#define F_CSUM ((uint64_t)1 << 0)

static uint64_t feature_of(uint8_t gso_type)
{
    switch (gso_type) {
    case 1: return (uint64_t)1 << 11; /* TCPV4, F_HOST_TSO4 */
    case 4: return (uint64_t)1 << 12; /* TCPV6, F_HOST_TSO6 */
    case 3: return (uint64_t)1 << 14; /* UDP, F_HOST_UFO */
    default: return 0;
    }
}

/* Make of the driver's header the one to send: `net_header.checked`. False: the frame is not to be sent as it wants. */
static bool check(struct header *header, size_t frame, uint64_t features)
{
    if (frame < ETHERNET_HEADER || frame > MAX_FRAME)
        return false;
    header->flags &= NEEDS_CSUM;
    header->num_buffers = 0;
    if (header->flags) {
        if (!(features & F_CSUM) || (size_t)header->csum_start + header->csum_offset + 2 > frame)
            return false;
    } else {
        header->csum_start = header->csum_offset = 0;
    }
    if (header->gso_type == 0)
        header->hdr_len = header->gso_size = 0;
    else if (!(features & feature_of(header->gso_type)) || !header->flags || !header->gso_size || header->hdr_len > frame)
        return false;
    return true;
}

/* send_frames(fd, next_avail, next_used, features, limit) -> (frames sent, why it ended) */
PyObject *send_frames(PyObject *self, PyObject *arguments)
{
    struct ring *ring = (struct ring *)self;
    struct iovec vector[MAX_VECTOR];
    int fd, limit, sent, why = DONE;
    unsigned short next_avail, next_used;
    unsigned long long features;

    if (!PyArg_ParseTuple(arguments, "iHHKi", &fd, &next_avail, &next_used, &features, &limit))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (sent = 0; sent < limit; sent++) {
        int available = ring_available(ring, next_avail), skipped;
        struct header header;
        struct chain chain;

        if (available <= 0) {
            why = available ? ODD : EMPTY;
            break;
        }
        /* The copy of the header takes the place of a piece that it is skipped in, or one that is kept free before the rest. */
        if (!ring_walk(ring, next_avail, vector + 1, MAX_VECTOR - 1, &chain) || chain.writable ||
            chain.readable_bytes < HEADER_SIZE) {
            why = ODD;
            break;
        }
        vector_read(vector + 1, 0, &header, HEADER_SIZE);
        if (!check(&header, chain.readable_bytes - HEADER_SIZE, features)) {
            why = ODD;
            break;
        }
        skipped = vector_skip(vector + 1, HEADER_SIZE);
        vector[skipped] = (struct iovec){&header, HEADER_SIZE};
        if (writev(fd, vector + skipped, chain.readable - skipped + 1) < 0) {
            why = errno == EAGAIN ? FULL : ODD;
            break;
        }
        next_avail++;
        ring_fill(ring, next_used++, chain.head, 0);
        ring_publish(ring, next_used);
    }
    Py_END_ALLOW_THREADS
    return Py_BuildValue("ii", sent, why);
}
