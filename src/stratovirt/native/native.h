/* What the C files of the compiled module share. Python.h comes first, as it asks for. */
#ifndef STRATOVIRT_NATIVE_H
#define STRATOVIRT_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* pages.c */
PyObject *keep_arenas(PyObject *module, PyObject *nothing);
PyObject *kept_arenas(PyObject *module, PyObject *nothing);
PyObject *lay_file_over(PyObject *module, PyObject *arguments);
PyObject *set_file_page(PyObject *module, PyObject *arguments);
PyObject *give_back_equal(PyObject *module, PyObject *arguments);

/* code.c */
PyObject *settle_code(PyObject *module, PyObject *code);

#endif
