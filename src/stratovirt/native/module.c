/* The compiled module `stratovirt.native._native`: what is in it, and nothing else.
 *
 * A function comes here only when a benchmark has shown that it is worth it, and has a version in Python that does the same,
 * to which tests hold it. It stands in a C file with others of its kind, and in _native.pyi. Nothing here keeps state.
 * The exceptions are pages.c and code.c: Python cannot do it, and without it nothing is done.
 */
#include "rings.h"

/* Must be INTERFACE of __init__.py. Count up when a function, its arguments or its result change. */
#define INTERFACE 5

static PyObject *full_barrier(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing))
{
    /* Earlier stores before later loads, which no processor does by itself: mfence or a locked instruction, dmb ish. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"full_barrier", full_barrier, METH_NOARGS, "Order all memory accesses before it before all behind it."},
    {"keep_arenas", keep_arenas, METH_NOARGS, "From now on an arena of the interpreter is never unmapped."},
    {"kept_arenas", kept_arenas, METH_NOARGS, "Addresses of the arenas that were made since keep_arenas."},
    {"lay_file_over", lay_file_over, METH_VARARGS, "(fd, address, length, offset): memory becomes a private mapping of a file."},
    {"set_file_page", set_file_page, METH_VARARGS, "(fd, offset, address, content): the file's page becomes another."},
    {"give_back_equal", give_back_equal, METH_VARARGS,
     "(pagemap, address, file_address, count): give back pages that equal the file's; how many."},
    {"settle_code", settle_code, METH_O, "The interpreter writes to this code no more."},
    {NULL, NULL, 0, NULL},
};

static int set_up(PyObject *module)
{
    return PyModule_AddIntConstant(module, "INTERFACE", INTERFACE) ? -1 : rings_set_up(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, set_up},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* no state: what two threads could share is the caller's to lock, as with the Python version */
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = 0, .m_methods = functions, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
