/* Code that stays as it is: see launcher/practice.py for what it is good for. CPython 3.11 only, which writes to code by running it.
 *
 * A function counts its calls up to the eighth (co_warmup) and is specialized then, instruction by instruction: each tries to become a
 * quicker form, and where it cannot, an adaptive one counts down to the next try. Every count is a write to the code's page. Code
 * that is settled counts no more: an instruction that has a quicker form keeps it, the others become the plain ones that
 * they are for a reader of co_code.
 */
#if defined(__has_include)
#if __has_include(<internal/pycore_opcode.h>)
#define HAS_TABLES
#define Py_BUILD_CORE 1 /* for the tables of instructions and nothing else */
#endif
#endif
#include "native.h"

#if defined(HAS_TABLES) && PY_VERSION_HEX >> 16 == 0x030B
#define NEED_OPCODE_TABLES
#include <internal/pycore_code.h>
#include <internal/pycore_opcode.h>
#include <opcode.h>

static int is_adaptive(int instruction)
{
    switch (instruction) {
    case BINARY_OP_ADAPTIVE:
    case BINARY_SUBSCR_ADAPTIVE:
    case CALL_ADAPTIVE:
    case COMPARE_OP_ADAPTIVE:
    case LOAD_ATTR_ADAPTIVE:
    case LOAD_GLOBAL_ADAPTIVE:
    case LOAD_METHOD_ADAPTIVE:
    case PRECALL_ADAPTIVE:
    case STORE_ATTR_ADAPTIVE:
    case STORE_SUBSCR_ADAPTIVE:
    case UNPACK_SEQUENCE_ADAPTIVE:
        return 1;
    default:
        return 0;
    }
}

static void settle(PyCodeObject *code)
{
    if (code->co_warmup) { /* not specialized yet */
        code->co_warmup = 0; /* "done", and so it will never be */
        return;
    }
    _Py_CODEUNIT *unit = _PyCode_CODE(code);
    for (Py_ssize_t i = 0; i < Py_SIZE(code); i++) {
        const int plain = _PyOpcode_Deopt[_Py_OPCODE(unit[i])];
        if (is_adaptive(_Py_OPCODE(unit[i])))
            _Py_SET_OPCODE(unit[i], plain);
        i += _PyOpcode_Caches[plain];
    }
}
#else
static void settle(PyCodeObject *Py_UNUSED(code)) {} /* other versions count in other ways */
#endif

PyObject *settle_code(PyObject *Py_UNUSED(module), PyObject *code)
{
    if (!PyCode_Check(code)) {
        PyErr_SetString(PyExc_TypeError, "settle_code: not a code object");
        return NULL;
    }
    settle((PyCodeObject *)code);
    Py_RETURN_NONE;
}
