/* Reads and writes of a disk: carried out where they are found, as `virtio/block.py` does with an image that has no engine, or made
 * into the objects that engines take.
 *
 * A batch is what is available, up to the first request that is not plain: of another kind, out of bounds, or malformed. Its
 * reads, or writes, that follow each other are sorted, and neighbours on the disk are one preadv2 or pwritev2, as in
 * `block_request.merge`. A request header lies in the chain's first 16 readable bytes and its status in the last writable one,
 * however the driver draws the borders (VIRTIO 1.2, 2.7.4.2).
 *
 * When a transfer fails or is short, none of its run is answered: Python does the run again, and finds out who is to blame.
 */
#include "rings.h"

#include <structmember.h>

#define HEADER_SIZE 16
#define SECTOR_SIZE 512
#define MAX_RUN 32 /* MAX_MERGED of block_request.py */

enum { T_IN, T_OUT };

struct request {
    uint64_t offset, length; /* bytes on the disk */
    int first, count;        /* its data, in the pieces of the run */
    uint16_t head;
    uint8_t *status;
};

struct disk {
    int fd;
    uint64_t sectors;
    bool writes; /* may be done here */
};

struct run {
    uint32_t kind;
    int requests, pieces;
    struct request request[MAX_RUN];
    struct iovec vector[MAX_VECTOR];
};

/* Add the request at `position` to a run, if it is plain and goes with it. */
static bool add(struct ring *ring, const struct disk *disk, uint16_t position, struct run *run)
{
    struct iovec *data = run->vector + run->pieces, *last;
    struct request *request = &run->request[run->requests];
    struct chain chain;
    struct {
        uint32_t kind, reserved;
        uint64_t sector;
    } header;
    uint64_t sectors;

    if (!ring_walk(ring, position, data, MAX_VECTOR - run->pieces, &chain))
        return false;
    if (chain.readable_bytes < HEADER_SIZE || chain.writable_bytes < 1)
        return false;
    vector_read(data, 0, &header, HEADER_SIZE);
    if (header.kind > (disk->writes ? T_OUT : T_IN) || (run->requests && header.kind != run->kind))
        return false;
    last = data + chain.readable + chain.writable - 1;
    request->status = (uint8_t *)last->iov_base + --last->iov_len;
    if (header.kind == T_IN) {
        request->length = chain.writable_bytes - 1;
        request->first = run->pieces + chain.readable;
        request->count = chain.writable - (last->iov_len == 0);
    } else {
        int skipped = vector_skip(data, HEADER_SIZE);

        request->length = chain.readable_bytes - HEADER_SIZE;
        request->first = run->pieces + skipped;
        request->count = chain.readable - skipped;
    }
    sectors = request->length / SECTOR_SIZE;
    if (sectors == 0 || request->length % SECTOR_SIZE || sectors > disk->sectors || header.sector > disk->sectors - sectors)
        return false;
    request->offset = header.sector * SECTOR_SIZE;
    request->head = chain.head;
    run->kind = header.kind;
    run->pieces = request->first + request->count;
    run->requests++;
    return true;
}

static void sort(struct run *run)
{
    for (int number = 1; number < run->requests; number++) {
        struct request moved = run->request[number];
        int at = number;

        for (; at && run->request[at - 1].offset > moved.offset; at--)
            run->request[at] = run->request[at - 1];
        run->request[at] = moved;
    }
}

static bool transfer(const struct disk *disk, const struct run *run)
{
    struct iovec vector[MAX_VECTOR];

    for (int next = 0; next < run->requests;) {
        uint64_t offset = run->request[next].offset, end = offset;
        int pieces = 0;
        ssize_t done;

        do { /* all pieces of a run together fit into one vector */
            const struct request *request = &run->request[next++];

            for (int piece = 0; piece < request->count; piece++)
                vector[pieces++] = run->vector[request->first + piece];
            end += request->length;
        } while (next < run->requests && run->request[next].offset == end);
        /* The calls that Python's os.preadv and os.pwritev make, for a filter allows no others. */
        done = run->kind == T_IN ? preadv2(disk->fd, vector, pieces, (off_t)offset, 0)
                                 : pwritev2(disk->fd, vector, pieces, (off_t)offset, 0);
        if (done < 0 || (uint64_t)done != end - offset)
            return false;
    }
    return true;
}

/* serve_disk(fd, sectors, writes, next_avail, next_used, limit)
 *     -> (served, left to Python, reads, bytes read, writes, bytes written)
 * `left to Python`: so many of those that come next; 0: there are no more, or the limit was reached. */
PyObject *serve_disk(PyObject *self, PyObject *arguments)
{
    struct ring *ring = (struct ring *)self;
    struct disk disk;
    struct run run;
    unsigned long long sectors, bytes[2] = {0, 0}, operations[2] = {0, 0};
    int writes, limit, served = 0, left = 0;
    unsigned short next_avail, next_used;

    if (!PyArg_ParseTuple(arguments, "iKpHHi", &disk.fd, &sectors, &writes, &next_avail, &next_used, &limit))
        return NULL;
    disk.sectors = sectors;
    disk.writes = writes;
    Py_BEGIN_ALLOW_THREADS
    while (!left && served < limit) {
        int available = ring_available(ring, next_avail);

        if (available == 0)
            break;
        if (available > limit - served)
            available = limit - served;
        run.requests = run.pieces = 0;
        while (run.requests < available && run.requests < MAX_RUN &&
               add(ring, &disk, (uint16_t)(next_avail + run.requests), &run))
            continue;
        if (run.requests == 0) { /* the index makes no sense, or the next one is not plain */
            left = 1;
            break;
        }
        sort(&run);
        if (!transfer(&disk, &run)) {
            left = run.requests;
            break;
        }
        for (int number = 0; number < run.requests; number++) {
            const struct request *request = &run.request[number];

            *request->status = 0;
            ring_fill(ring, next_used++, request->head, run.kind == T_IN ? (uint32_t)request->length + 1 : 1);
            bytes[run.kind] += request->length;
        }
        ring_publish(ring, next_used);
        operations[run.kind] += (unsigned)run.requests;
        next_avail += (uint16_t)run.requests;
        served += run.requests;
    }
    Py_END_ALLOW_THREADS
    return Py_BuildValue("iiKKKK", served, left, operations[T_IN], bytes[T_IN], operations[T_OUT], bytes[T_OUT]);
}

/* -- for engines */

static const char *const field_names[REQUEST_FIELDS] = {
    "kind", "offset", "length", "written", "head", "index", "views", "status", "queue", "durable", "unmap", "error",
};
enum { KIND, OFFSET, LENGTH, WRITTEN, HEAD, INDEX, VIEWS, STATUS, QUEUE, DURABLE, UNMAP, ERROR };

/* Where the fields of a class with __slots__ are; so an instance is made without running any Python. */
static bool learn(struct ring *ring, PyObject *type)
{
    Py_CLEAR(ring->request_type);
    for (int field = 0; field < REQUEST_FIELDS; field++) {
        PyObject *slot = PyObject_GetAttrString(type, field_names[field]);

        if (slot == NULL)
            return false;
        if (!Py_IS_TYPE(slot, &PyMemberDescr_Type) || ((PyMemberDescrObject *)slot)->d_member->type != T_OBJECT_EX) {
            Py_DECREF(slot);
            PyErr_Format(PyExc_TypeError, "%s is not in a slot", field_names[field]);
            return false;
        }
        ring->request_field[field] = ((PyMemberDescrObject *)slot)->d_member->offset;
        Py_DECREF(slot);
    }
    ring->request_type = Py_NewRef(type);
    return true;
}

/* A view of the RAM that a piece is. */
static PyObject *view_of(const struct ring *ring, const void *at, size_t length)
{
    for (unsigned number = 0; number < ring->regions; number++) {
        const struct region *region = &ring->region[number];
        const uint8_t *first = at;

        if (first >= region->host && first < region->host + region->size)
            return PySequence_GetSlice(region->view, first - region->host, first - region->host + (Py_ssize_t)length);
    }
    PyErr_SetString(PyExc_SystemError, "a piece of no region");
    return NULL;
}

static PyObject *make(const struct ring *ring, const struct run *run, const struct request *request, PyObject *index,
                      PyObject *queue)
{
    PyTypeObject *type = (PyTypeObject *)ring->request_type;
    PyObject *made = type->tp_alloc(type, 0), *value[REQUEST_FIELDS], *views;
    bool failed = made == NULL;

    if (failed)
        return NULL;
    views = PyList_New(request->count);
    for (int piece = 0; views != NULL && piece < request->count; piece++) {
        const struct iovec *part = &run->vector[request->first + piece];
        PyObject *view = view_of(ring, part->iov_base, part->iov_len);

        if (view == NULL)
            Py_CLEAR(views);
        else
            PyList_SET_ITEM(views, piece, view);
    }
    value[KIND] = PyLong_FromLong((long)run->kind); /* READ and WRITE of backends/block.py are IN and OUT */
    value[OFFSET] = PyLong_FromUnsignedLongLong(request->offset);
    value[LENGTH] = PyLong_FromUnsignedLongLong(request->length);
    value[WRITTEN] = PyLong_FromUnsignedLongLong(run->kind == T_IN ? request->length : 0);
    value[HEAD] = PyLong_FromLong(request->head);
    value[INDEX] = Py_NewRef(index);
    value[VIEWS] = views;
    value[STATUS] = view_of(ring, request->status, 1);
    value[QUEUE] = Py_NewRef(queue);
    value[DURABLE] = Py_NewRef(Py_False);
    value[UNMAP] = Py_NewRef(Py_False);
    value[ERROR] = Py_NewRef(Py_None);
    for (int field = 0; field < REQUEST_FIELDS; field++) {
        failed = failed || value[field] == NULL;
        *(PyObject **)((char *)made + ring->request_field[field]) = value[field]; /* an empty slot is NULL */
    }
    if (failed)
        Py_CLEAR(made);
    return made;
}

/* take_requests(type, sectors, writes, next_avail, limit, index, queue) -> [instance of type]
 * Of one kind, in the order of the ring; [] when the next request is not plain, or there is none. */
PyObject *take_requests(PyObject *self, PyObject *arguments)
{
    struct ring *ring = (struct ring *)self;
    struct disk disk = {.fd = -1};
    struct run run;
    unsigned long long sectors;
    unsigned short next_avail;
    int writes, limit, available;
    PyObject *type, *index, *queue, *list;

    if (!PyArg_ParseTuple(arguments, "O!KpHiO!O", &PyType_Type, &type, &sectors, &writes, &next_avail, &limit, &PyLong_Type,
                          &index, &queue))
        return NULL;
    if (ring->request_type != type && !learn(ring, type))
        return NULL;
    disk.sectors = sectors;
    disk.writes = writes;
    run.requests = run.pieces = 0;
    available = ring_available(ring, next_avail);
    while (run.requests < available && run.requests < limit && run.requests < MAX_RUN &&
           add(ring, &disk, (uint16_t)(next_avail + run.requests), &run))
        continue;
    list = PyList_New(run.requests);
    for (int number = 0; list != NULL && number < run.requests; number++) {
        PyObject *made = make(ring, &run, &run.request[number], index, queue);

        if (made == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, number, made);
    }
    return list;
}
