/* A virtqueue in C: what `virtio/queue.py` does, for chains that are as they should be. Its docstring has the layout.
 *
 * A Ring has geometry and no position: `Virtqueue` keeps that, tells it with each call and goes on by what was done. So there is
 * one owner of it, and both versions can take turns. What breaks a rule, or has a shape that is rare, is left where it is, for
 * Python to take and to answer; a chain that was left has not been touched.
 *
 * The driver writes while we read. So everything is copied out once and judged then, and an index is one aligned access. Loads of
 * avail.idx acquire (entries are read after it) and stores of used.idx release (entries, and what is in the buffers, are
 * written before it), which is all that arm64 needs beside the full barrier in `ring_ask`.
 *
 * Thread: whoever holds the device's lock. Nothing in here but the type itself needs the GIL.
 */
#include "rings.h"

#include <string.h>

#define DESC_SIZE 16
#define F_NEXT 1
#define F_WRITE 2
#define F_INDIRECT 4
#define MAX_CHAIN_BYTES ((uint64_t)1 << 32)

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};
_Static_assert(sizeof(struct descriptor) == DESC_SIZE, "struct virtq_desc");

/* Where a guest's range lies, NULL if not wholly inside one region of RAM: the gate of `GuestMemory.region`. */
static uint8_t *find(struct ring *ring, uint64_t address, uint64_t length)
{
    for (unsigned tried = 0; tried < ring->regions; tried++) {
        const struct region *region = &ring->region[ring->last];
        if (address >= region->base && length <= region->size && address - region->base <= region->size - length)
            return region->host + (address - region->base);
        ring->last = (ring->last + 1) % ring->regions;
    }
    return NULL;
}

static struct descriptor load(const uint8_t *table, unsigned index)
{
    struct descriptor copy;

    memcpy(&copy, table + (size_t)DESC_SIZE * index, sizeof copy);
    __asm__ volatile("" : "+m"(copy) : : "memory"); /* the compiler must not read the guest's a second time */
    return copy;
}

/* How many chains are available from `position` on, -1 for more than there can be. Their entries may be read then. */
int ring_available(const struct ring *ring, uint16_t position)
{
    uint16_t pending = __atomic_load_n(&ring->avail[1], __ATOMIC_ACQUIRE) - position;

    return pending > ring->size ? -1 : pending;
}

/* The chain at a position of the available ring, which was announced. False: it is Python's. */
bool ring_walk(struct ring *ring, uint16_t position, struct iovec *vector, int room, struct chain *chain)
{
    const uint8_t *table = ring->table;
    unsigned index = __atomic_load_n(&ring->avail[2 + position % ring->size], __ATOMIC_RELAXED), count = ring->size, seen = 0;
    uint64_t total = 0;
    bool indirect = false;

    if (index >= ring->size)
        return false;
    *chain = (struct chain){.head = (uint16_t)index};
    for (;;) {
        struct descriptor entry = load(table, index);
        uint8_t *at;

        if (entry.flags & F_INDIRECT) {
            if (indirect || !ring->indirect || entry.flags & F_NEXT || entry.length == 0 || entry.length % DESC_SIZE)
                return false;
            count = entry.length / DESC_SIZE;
            table = find(ring, entry.address, entry.length);
            if (count > 0xFFFF || table == NULL)
                return false;
            index = 0;
            indirect = true;
            continue;
        }
        total += entry.length;
        if (++seen > ring->size || entry.length == 0 || total > MAX_CHAIN_BYTES || room-- <= 0)
            return false;
        at = find(ring, entry.address, entry.length);
        if (at == NULL)
            return false;
        *vector++ = (struct iovec){at, entry.length};
        if (entry.flags & F_WRITE) {
            chain->writable++;
            chain->writable_bytes += entry.length;
        } else if (chain->writable) {
            return false;
        } else {
            chain->readable++;
            chain->readable_bytes += entry.length;
        }
        if (!(entry.flags & F_NEXT))
            return true;
        if (entry.next >= count)
            return false;
        index = entry.next;
    }
}

/* Ask for a notification of what comes at `position` and later. True: something is there by now. */
bool ring_ask(const struct ring *ring, uint16_t position)
{
    if (ring->event_idx)
        __atomic_store_n(&ring->used[2 + 4 * ring->size], position, __ATOMIC_RELAXED);
    else
        __atomic_store_n(&ring->used[0], 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(&ring->avail[1], __ATOMIC_ACQUIRE) != position;
}

void ring_fill(const struct ring *ring, uint16_t position, uint16_t head, uint32_t written)
{
    uint32_t entry[2] = {head, written};

    memcpy(ring->used + 2 + 4 * (position % ring->size), entry, sizeof entry);
}

/* Everything before `position` has been filled: the driver may see it. */
void ring_publish(const struct ring *ring, uint16_t position)
{
    __atomic_store_n(&ring->used[1], position, __ATOMIC_RELEASE);
}

void vector_read(const struct iovec *vector, size_t from, void *to, size_t length)
{
    for (; length; vector++) {
        size_t part = vector->iov_len - from;

        if (from >= vector->iov_len) {
            from -= vector->iov_len;
            continue;
        }
        part = part < length ? part : length;
        memcpy(to, (uint8_t *)vector->iov_base + from, part);
        to = (uint8_t *)to + part;
        length -= part;
        from = 0;
    }
}

void vector_write(const struct iovec *vector, size_t at, const void *from, size_t length)
{
    for (; length; vector++) {
        size_t part = vector->iov_len - at;

        if (at >= vector->iov_len) {
            at -= vector->iov_len;
            continue;
        }
        part = part < length ? part : length;
        memcpy((uint8_t *)vector->iov_base + at, from, part);
        from = (const uint8_t *)from + part;
        length -= part;
        at = 0;
    }
}

int vector_skip(struct iovec *vector, size_t length)
{
    int pieces = 0;

    while (length && length >= vector[pieces].iov_len)
        length -= vector[pieces++].iov_len;
    if (length) {
        vector[pieces].iov_base = (uint8_t *)vector[pieces].iov_base + length;
        vector[pieces].iov_len -= length;
    }
    return pieces;
}

/* -- the type */

static PyObject *ring_new(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(keywords))
{
    unsigned size;
    unsigned long long table, avail, used;
    int event_idx, indirect;
    PyObject *regions;
    struct ring *ring;

    if (!PyArg_ParseTuple(arguments, "IKKKppO!", &size, &table, &avail, &used, &event_idx, &indirect, &PyList_Type, &regions))
        return NULL;
    if (size == 0 || size > 0x8000 || size & (size - 1) || table % 16 || avail % 2 || used % 4)
        return PyErr_Format(PyExc_ValueError, "no such geometry");
    ring = (struct ring *)type->tp_alloc(type, 0);
    if (ring == NULL)
        return NULL;
    ring->size = size;
    ring->event_idx = event_idx;
    ring->indirect = indirect;
    for (Py_ssize_t number = 0; number < PyList_GET_SIZE(regions) && number < MAX_REGIONS; number++) {
        struct region *region = &ring->region[number];
        unsigned long long base;
        PyObject *view;

        if (!PyArg_ParseTuple(PyList_GET_ITEM(regions, number), "KO", &base, &view) ||
            PyObject_GetBuffer(view, &region->buffer, PyBUF_WRITABLE)) {
            Py_DECREF(ring);
            return NULL;
        }
        region->base = base;
        region->view = Py_NewRef(view);
        region->host = region->buffer.buf;
        region->size = (uint64_t)region->buffer.len;
        ring->regions++;
    }
    ring->table = find(ring, table, (uint64_t)DESC_SIZE * size);
    ring->avail = (const uint16_t *)find(ring, avail, 6 + 2 * (uint64_t)size);
    ring->used = (uint16_t *)find(ring, used, 6 + 8 * (uint64_t)size);
    if (ring->table == NULL || ring->avail == NULL || ring->used == NULL) {
        Py_DECREF(ring);
        return PyErr_Format(PyExc_ValueError, "the rings are not in these regions");
    }
    return (PyObject *)ring;
}

static void ring_free(PyObject *self)
{
    struct ring *ring = (struct ring *)self;
    PyTypeObject *type = Py_TYPE(self);

    for (unsigned number = 0; number < ring->regions; number++) {
        PyBuffer_Release(&ring->region[number].buffer);
        Py_CLEAR(ring->region[number].view);
    }
    Py_CLEAR(ring->request_type);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef ring_methods[] = {
    {"serve_disk", serve_disk, METH_VARARGS, "Carry out plain reads and writes of a disk."},
    {"take_requests", take_requests, METH_VARARGS, "Make objects of plain reads and writes of a disk."},
    {"receive_frames", receive_frames, METH_VARARGS, "Read frames from a tap into receive buffers."},
    {"send_frames", send_frames, METH_VARARGS, "Write the driver's frames to a tap."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_free},
    {Py_tp_methods, ring_methods},
    {Py_tp_doc, "Ring(size, descriptor table, available ring, used ring, event_idx, indirect, [(base, view of the region)])"},
    {0, NULL},
};

static PyType_Spec ring_spec = {
    .name = "stratovirt.native._native.Ring",
    .basicsize = sizeof(struct ring),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = ring_slots,
};

int rings_set_up(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &ring_spec, NULL);
    int failed;

    if (type == NULL)
        return -1;
    failed = PyModule_AddObjectRef(module, "Ring", type);
    Py_DECREF(type);
    return failed;
}
