"""Large arrays on memory that is used again.

A step of an optimisation makes the same arrays as the one before, many megabytes each. Fresh memory comes from the
system page by page, zeroed at the first touch, which for a million Gaussians costs a sixth of a render. So the memory
of an array made here goes, when the last array or tensor on it is gone, to a list from which the next takes it.
The list holds what renders of late needed at once; `free` empties it.
"""

import math
import threading
from collections import deque
from typing import Any

import numpy as np

SMALLEST = 1 << 18  # bytes; what is smaller, the C library keeps by itself
PATIENCE = 256  # a block that so many others were taken before it was asked for, some ten renders, is given up

_free: list[tuple[int, np.ndarray]] = []  # when it came, and the block; the longest waiting first
_taken = 0
_lock = threading.Lock()
# Where blocks come back to. An array may die at any moment, even while this thread holds the lock: when the garbage
# collector finds it. So this needs none: appending to a deque is atomic.
_returned: deque[np.ndarray] = deque()


class _Loan:
    """Owns a block as long as an array or a tensor is on it."""

    def __init__(self, block: np.ndarray, shape: tuple[int, ...], dtype: Any) -> None:
        self.block = block
        start = _address(block) + -_address(block) % 64
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (start, False),
        }

    def __del__(self) -> None:
        _returned.append(self.block)


def empty(shape: int | tuple[int, ...], dtype: Any = np.float32, aligned: bool = False) -> np.ndarray:
    """An array of any content, C-contiguous, that begins at a cache line if it is large or that is asked for."""
    shape = tuple(map(int, shape)) if isinstance(shape, tuple) else (int(shape),)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= SMALLEST:
        return np.asarray(_Loan(_take(size), shape, dtype))
    if not aligned:
        return np.empty(shape, dtype)
    block = np.empty(size + 64, np.uint8)
    skip = -_address(block) % 64
    return block[skip : skip + size].view(dtype).reshape(shape)


def waiting() -> int:
    """Bytes that wait to be used again."""
    with _lock:
        _tidy()
        return sum(block.nbytes for _, block in _free)


def free() -> None:
    """Give all memory that waits to be used again back to the system."""
    with _lock:
        _tidy()
        _free.clear()


def _tidy() -> None:
    """Take in what came back, give up what nobody asked for. With the lock held."""
    while _returned:
        _free.append((_taken, _returned.popleft()))
    while _free and _free[0][0] < _taken - PATIENCE:
        _free.pop(0)


def _address(block: np.ndarray) -> int:
    return block.__array_interface__["data"][0]


def _take(size: int) -> np.ndarray:
    """The smallest free block that holds `size` bytes and is not half empty, else a new one."""
    global _taken
    with _lock:
        _taken += 1
        _tidy()
        fitting = [(block.nbytes, i) for i, (_, block) in enumerate(_free) if size + 64 <= block.nbytes <= 2 * size]
        if fitting:
            return _free.pop(min(fitting)[1])[1]
    step = 1 << max(12, size.bit_length() - 4)  # so that the next, a little larger, fits too
    return np.empty((size + 64 + step - 1) // step * step, np.uint8)
