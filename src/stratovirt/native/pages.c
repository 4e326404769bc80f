/* Pages of the interpreter's memory that a process made by fork gives back: see launcher/pages.py for what it is good for.
 *
 * The interpreter's memory is its arenas, in which all objects of up to 512 bytes are. It has one property that everything here
 * rests on: who writes there holds the interpreter's lock, but for the kernel, which puts results of system calls into
 * buffers while other threads run. Functions of this module that let go of the lock write to guest memory and to their stacks, and
 * to nothing that is small enough for an arena.
 */
#define _GNU_SOURCE /* mremap */
#include "rings.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Counted by pymalloc with 16 KiB pools; an interpreter with other ones keeps its arenas the way it always did. */
#define ARENA_SIZE ((size_t)1 << 20)
#define MOST_ARENAS 1024
#define MOST_PAGES 256

#define LARGEST_IN_ARENAS 512
_Static_assert(sizeof(struct ring) > LARGEST_IN_ARENAS, "written without the interpreter's lock");

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4 /* Linux 5.7; for files since 5.13 */
#endif

/* From /proc/PID/pagemap: the page is there; it is of a file, not of this process alone. */
#define PAGE_PRESENT ((uint64_t)1 << 63)
#define PAGE_OF_FILE ((uint64_t)1 << 61)

/* -- arenas stay where they are
 *
 * An arena that the interpreter has no use for would be unmapped, and its place would go to anybody, guest memory or a thread's
 * stack. One that is kept for the next time is an arena for ever, and so its place can be remembered.
 */
static PyObjectArenaAllocator first_allocator;
static void *arenas[MOST_ARENAS]; /* those that were made since */
static size_t arena_count;
static void *unused[MOST_ARENAS];
static size_t unused_count;

static void *make_arena(void *context, size_t size)
{
    if (size == ARENA_SIZE && unused_count)
        return unused[--unused_count];
    void *arena = first_allocator.alloc(context, size);
    if (arena && size == ARENA_SIZE && arena_count < MOST_ARENAS)
        arenas[arena_count++] = arena;
    return arena;
}

static void drop_arena(void *context, void *arena, size_t size)
{
    if (size != ARENA_SIZE) {
        first_allocator.free(context, arena, size); /* a piece of the interpreter's own stack */
        return;
    }
    madvise(arena, size, MADV_DONTNEED); /* what was in it is of no interest, and its pages are not kept */
    if (unused_count < MOST_ARENAS)
        unused[unused_count++] = arena;
    /* else its place is lost: it is never somebody else's */
}

PyObject *keep_arenas(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing))
{
    PyObjectArenaAllocator now;
    PyObject_GetArenaAllocator(&now);
    if (now.alloc != make_arena) {
        first_allocator = now;
        now.alloc = make_arena;
        now.free = drop_arena;
        PyObject_SetArenaAllocator(&now);
    }
    Py_RETURN_NONE;
}

PyObject *kept_arenas(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing))
{
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < arena_count; i++) {
        PyObject *address = PyLong_FromVoidPtr(arenas[i]);
        if (!address || PyList_Append(list, address) < 0)
            Py_CLEAR(list);
        Py_XDECREF(address);
    }
    return list;
}

/* -- memory becomes a private mapping of a file
 *
 * Between the copy and the mapping nothing may write there: the lock is held and there is no other thread. So not a line of
 * Python may come in between.
 */
PyObject *lay_file_over(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    int fd;
    Py_ssize_t address, length, offset;
    if (!PyArg_ParseTuple(arguments, "innn:lay_file_over", &fd, &address, &length, &offset))
        return NULL;
    for (Py_ssize_t done = 0; done < length;) {
        ssize_t written = pwrite(fd, (char *)address + done, length - done, offset + done);
        if (written <= 0)
            return PyErr_SetFromErrno(PyExc_OSError);
        done += written;
    }
    if (mmap((void *)address, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, offset) == MAP_FAILED)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

/* What the file has there becomes something else. This process does not see it: it gets a copy of the page first. */
PyObject *set_file_page(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    int fd;
    Py_ssize_t offset, address;
    Py_buffer content;
    if (!PyArg_ParseTuple(arguments, "inny*:set_file_page", &fd, &offset, &address, &content))
        return NULL;
    volatile char *const here = (char *)address;
    *here = *here;
    const ssize_t written = pwrite(fd, content.buf, content.len, offset);
    const int whole = written == content.len;
    PyBuffer_Release(&content);
    if (!whole)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

/* -- pages that equal the file are given back
 *
 * A page that was found equal is moved away, which is one step for all threads, and compared once more where no thread can
 * reach it: what the kernel wrote meanwhile came either before the move, and is carried over, or after it, into a fresh copy of
 * the file's page. Nothing is lost, and who reads sees what was there all the time.
 */
static int give_back(char *pages, const char *file, char *aside, size_t length)
{
    if (mremap(pages, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, aside) == MAP_FAILED)
        return -1;
    if (memcmp(aside, file, length) != 0)
        for (size_t i = 0; i < length; i++)
            if (aside[i] != file[i])
                pages[i] = aside[i];
    return 0;
}

PyObject *give_back_equal(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    int pagemap;
    Py_ssize_t address, file_address, count;
    if (!PyArg_ParseTuple(arguments, "innn:give_back_equal", &pagemap, &address, &file_address, &count))
        return NULL;
    const size_t page = sysconf(_SC_PAGESIZE);
    uint64_t states[MOST_PAGES];
    if (count < 0 || count > MOST_PAGES || address % page || file_address % page) {
        PyErr_SetString(PyExc_ValueError, "give_back_equal: whole pages, and not that many at once");
        return NULL;
    }
    const ssize_t size = count * sizeof *states;
    if (lseek(pagemap, address / page * sizeof *states, SEEK_SET) < 0 || read(pagemap, states, size) != size)
        return PyErr_SetFromErrno(PyExc_OSError);
    char *const aside = mmap(NULL, count * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (aside == MAP_FAILED)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_ssize_t given = 0, run = 0;
    int failed = 0;
    for (Py_ssize_t i = 0; i <= count && !failed; i++) {
        char *const here = (char *)address + i * page;
        const char *const there = (const char *)file_address + i * page;
        if (i < count && (states[i] & PAGE_PRESENT) && !(states[i] & PAGE_OF_FILE) && memcmp(here, there, page) == 0) {
            run++;
        } else if (run) {
            failed = give_back(here - run * page, there - run * page, aside, run * page) < 0;
            given += run;
            run = 0;
        }
    }
    if (failed) /* what lies at `aside` now is not known, so it stays */
        return PyErr_SetFromErrno(PyExc_OSError);
    munmap(aside, count * page);
    madvise((void *)file_address, count * page, MADV_DONTNEED); /* from this process's tables: it was for comparing only */
    return PyLong_FromSsize_t(given);
}
