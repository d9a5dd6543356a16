"""Run a compiled kernel over a range, on torch.get_num_threads() plain Python threads: the kernels drop the GIL.

numba's own threading layers are no choice here: `workqueue` kills the process when two Python threads render at once
(a viewer beside an optimisation), `omp` kills forked children, `tbb` needs another package.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_executor: ThreadPoolExecutor | None = None


def chunks_of(count: int, smallest: int = 2048, most: int = 32) -> int:
    """Number of chunks for `count` items of at least `smallest` items each.

    It must not depend on the number of threads: sums are kept per chunk and added in the order of the chunks, so that
    the same bits come out on any machine setting.
    """
    return max(1, min(most, count // smallest))


def run(kernel: Callable[..., object], count: int, chunks: int, *args: object) -> None:
    """Call kernel(begin, end, chunk, *args) for each of `chunks` even parts of range(count), the caller helping.

    Safe from several threads at once and in a forked child. An exception in a kernel is raised here, after all parts
    have stopped.
    """
    chunks = min(chunks, count)
    if chunks <= 1:
        if count:
            kernel(0, count, 0, *args)
        return
    taken = itertools.count()  # next() on it is atomic: threads that finish early take more

    def work() -> None:
        while (chunk := next(taken)) < chunks:
            kernel(count * chunk // chunks, count * (chunk + 1) // chunks, chunk, *args)

    helpers = [_threads().submit(work) for _ in range(min(torch.get_num_threads(), chunks) - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():  # one that never started, because another caller holds the pool, is not missed
                helper.result()


def _threads() -> ThreadPoolExecutor:
    """The pool, made on first use; it starts a thread only when all it has are busy."""
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(max_workers=256, thread_name_prefix="splatedit-raster")
    return _executor


def _forget_threads() -> None:
    global _executor
    _executor = None


if hasattr(os, "register_at_fork"):  # a forked child inherits the pool without its threads
    os.register_at_fork(after_in_child=_forget_threads)
