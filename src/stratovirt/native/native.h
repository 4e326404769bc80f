/* What the C files of the compiled module share. Python.h comes first, as it asks for. */
#ifndef STRATOVIRT_NATIVE_H
#define STRATOVIRT_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#endif
