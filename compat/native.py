"""Finding the library that csrc/ was built into, and saying why it is not in use."""

import ctypes
import functools
import os
from pathlib import Path

VARIABLE = "MOESCALE_OPS"  # "reference" leaves the library alone
LIBRARY = Path(__file__).parent / "_native.abi3.so"


@functools.cache
def load_native() -> str:
    """Load the library's kernels into torch, once a process.

    Returns:
        Why they are not in use, in one line; "" where they are.

    Raises:
        ValueError: the environment asks for something unknown.
        OSError: the library is there and cannot be loaded: it was built for another torch, or is damaged.
    """
    wanted = os.environ.get(VARIABLE, "native")
    if wanted not in ("native", "reference"):
        raise ValueError(f"{VARIABLE} ({wanted}) must be native or reference")
    if wanted == "reference":
        return f"{VARIABLE}=reference"
    if not LIBRARY.is_file():
        return "not built: install g++, then pip install --no-build-isolation moescale (or make native in a clone)"
    import torch

    torch.ops.load_library(str(LIBRARY))
    return ""


def instruction_set() -> str:
    """What the CPU kernels were chosen for; "" where they are not in use."""
    if load_native():
        return ""
    name = ctypes.CDLL(str(LIBRARY)).moescale_instruction_set
    name.restype = ctypes.c_char_p
    return str(name().decode())
