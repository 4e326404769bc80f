"""The compiled module, as type checkers see it: one line a function; the C file that has it says what it does."""

INTERFACE: int

# module.c

def full_barrier() -> None: ...
