"""Memory of large arrays is used again, and only when nothing is on it any more."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch

from splatedit.render import memory

LARGE = memory.SMALLEST // 4 + 1000  # floats


@pytest.fixture(autouse=True)
def nothing_waits():
    memory.free()
    yield
    memory.free()


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("size", [1, 17, LARGE])
def test_shape_type_and_alignment(size: int):
    array = memory.empty((size, 3), np.int32, aligned=True)
    assert array.shape == (size, 3) and array.dtype == np.int32 and array.flags.c_contiguous and array.flags.writeable
    assert address(array) % 64 == 0
    array[:] = 7
    assert array.sum() == 21 * size


def test_memory_of_a_dead_array_is_used_again():
    array = memory.empty(LARGE)
    before = address(array)
    del array
    assert address(memory.empty(LARGE)) == before
    assert address(memory.empty(LARGE - 100)) == before, "a little smaller fits too"


def test_a_view_or_a_tensor_holds_the_memory():
    array = memory.empty((2, LARGE))
    row, tensor = array[1], torch.from_numpy(array).view(-1)[5:]
    tensor.fill_(3.0)
    del array
    other = memory.empty((2, LARGE))
    other[:] = 0
    assert (row[5:] == 3).all()
    del row
    gc.collect()
    another = memory.empty((2, LARGE))
    another[:] = 0
    assert (tensor == 3).all()
    before = tensor.data_ptr() - 20
    del tensor
    assert address(memory.empty((2, LARGE))) == before


def test_a_block_twice_as_large_is_left_for_others():
    array = memory.empty(3 * LARGE)
    before = address(array)
    del array
    assert address(memory.empty(LARGE)) != before


def test_what_is_no_longer_asked_for_is_given_up():
    array = memory.empty(20 * LARGE)
    del array
    assert memory.waiting() > 60 * LARGE
    for _ in range(memory.PATIENCE + 2):
        memory.empty(LARGE)
    assert 0 < memory.waiting() < 8 * LARGE
    memory.free()
    assert memory.waiting() == 0


def test_threads_share_it_without_sharing_memory():
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            array = memory.empty(LARGE)
            array[:] = number
            if (array != number).any():
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not wrong and not any(worker.is_alive() for worker in workers)


def test_an_array_may_die_while_its_thread_takes_memory():
    """The garbage collector may find one at any allocation, in the thread that holds the lock."""
    arrays = [memory.empty(LARGE)]

    def work() -> None:
        with memory._lock:
            arrays.clear()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(timeout=20)
    assert not worker.is_alive()
    assert memory.waiting() > 4 * LARGE
