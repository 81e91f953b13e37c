"""How the kernels are compiled: for their own types alone, when first called, and kept on disk.

Enters: a function on arrays and its signatures. Leaves: that function compiled, which lets other threads run while it
works. Invariant: code that is kept is used only by the source files that it was compiled from.
"""

import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit, types

F32, F64, I64 = types.float32, types.float64, types.int64
U8, U16, U32 = types.uint8, types.uint16, types.uint32

_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": False, "error_model": "numpy"}
INLINE: dict[str, Any] = {"forceinline": True, "fastmath": False, "error_model": "numpy"}


def array(axes: int, dtype: Any, writable: bool = False) -> Any:
    """The type of a C-contiguous array. One that is only read may also be one that can not be written."""
    return types.Array(dtype, axes, "C", readonly=not writable)


def kernel(*signatures: tuple) -> Callable[[Callable], Any]:
    """A function that is compiled for these signatures when it is first called. Other types raise TypeError."""

    def declared(function: Callable) -> Any:
        lock = threading.Lock()
        made: list[Any] = []

        @functools.wraps(function)
        def call(*args):
            if not made:
                with lock:
                    if not made:
                        made.append(_compiled(function, list(signatures)))
            return made[0](*args)

        return call

    return declared


@functools.cache
def _sources() -> str:
    """A digest of the files that the kernels are made of."""
    files = sorted(Path(__file__).parent.glob("kernel*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _compiled(function: Callable, signatures: list[tuple]) -> Any:
    # numba knows kept code by this name and by the state of the function's own file, not of those that it calls into
    function.__qualname__ = f"{function.__name__}_{_sources()}"
    try:
        return njit(signatures, cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder to keep code in: each process compiles its own
        return njit(signatures, **_OPTIONS)(function)


@njit(**INLINE)
def check(fits):
    """Raise ValueError where blocks of one call do not belong together."""
    if not fits:
        raise ValueError(
            "the blocks of this call differ in their rows or columns: expected blocks (R, C), (E, R, C) of experts, "
            "masks (R, ceil(C / 8)), and sums and scales of R rows"
        )
