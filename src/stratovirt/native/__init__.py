"""The compiled module, if it is there: a few functions that a benchmark has shown to be worth it.

`compiled` is that module or None, and `why` says why None. Whoever uses it has a Python version of the same, which does the
work where there is no compiled one, and which tests compare it with; nothing but speed may depend on it. STRATOVIRT_NATIVE=off
in the environment leaves it out.

It is made by setup.py out of the C files here (`lab/setup.sh native venv` does it in place), for one version of Python and one
architecture, which its file name says: an interpreter that it was not made for does not see it. `INTERFACE` is what it must
agree on with the Python code around it; one that was left by another version of the program is not used.

Imported with the first device that has a virtqueue, so before system call filters: from then on no shared object can be opened.
"""

from __future__ import annotations

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

# Counts changes of what C and Python agree on: functions, their arguments and results. The same number is in module.c.
INTERFACE = 5
# Why a function that works on a queue came to its end (rings.h). ODD: Python's turn, with what comes next.
DONE, EMPTY, ODD, FULL, SHORT, HOPELESS = range(6)
SWITCH = "STRATOVIRT_NATIVE"

compiled: ModuleType | None = None
why = ""


def _load() -> tuple[ModuleType | None, str]:
    if posix.environ.get(SWITCH.encode()) == b"off":
        return None, f"{SWITCH}=off"
    try:
        from stratovirt.native import _native
    except ImportError as error:
        return None, f"not compiled for this Python: {error}"
    if _native.INTERFACE != INTERFACE:
        return None, f"it was compiled for another version of the program ({_native.INTERFACE}, not {INTERFACE})"
    return _native, ""


compiled, why = _load()
