"""The compiled module, which an installation can do without: a missing compiler or Python.h is a warning, and no more.

Everything else about the package is in pyproject.toml. STRATOVIRT_STRICT makes warnings of the compiler errors, for tests.
"""

import os
from glob import glob

from setuptools import Extension, setup

FOLDER = "src/stratovirt/native"
FLAGS = ["-O2", "-std=c11", "-fvisibility=hidden"]
if os.environ.get("STRATOVIRT_STRICT"):
    FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]

setup(
    ext_modules=[
        Extension(
            "stratovirt.native._native",
            sources=sorted(glob(f"{FOLDER}/*.c")),
            depends=sorted(glob(f"{FOLDER}/*.h")),
            extra_compile_args=FLAGS,
            optional=not os.environ.get("STRATOVIRT_STRICT"),
        )
    ]
)
