"""How fast could the CPU renderer be? Counted work, divided by what this machine was measured to do.

A stage of the renderer takes, in CPU seconds summed over threads, at least about

    operations / rate + bytes / bandwidth

rate: 16-lane operations per second of one core, measured on a half-and-half mix of multiply-adds and additions, which
is about what the stages consist of and what cores are fastest at: a Zen 4 core starts one multiply-add *and* one other
512-bit operation per cycle, an Intel server core two of any kind. "limit" also says what it would be at the rate of
multiply-adds alone. bandwidth: of copying (bytes read plus bytes written) on all threads at once, since they share the
memory, with arrays as large as all data of the call, so that what fits the cache is charged the cache's speed.

operations and bytes, with n Gaussians of which v are visible, p pairs (tile, Gaussian) of which q come before their
tile has ended, and of the 4x4-pixel blocks that the rectangles around the ellipses touch live ones, h hit and m missed:

    Gaussians            20 v                  80 n + (68 + SH) v       project, colour, pack a record of 64 bytes
    order                                      116 v + 8 p              radix sort of depths, lists of the tiles
    pixels               33 h + 8 m + 12 q     68 q + 28 pixels         composite, front to back
    pixels backward      64 h' + 8 m' + 60 q   132 q + 32 pixels        back to front, one record of sums per pair
    Gaussians backward   40 v + p              (44 + SH) n + (96 + SH) v + 64 p

SH is 12 (degree + 1)^2 bytes; h', m' count up to the last contributor of a block. Page faults, which a program can
avoid by keeping its memory, and everything Python and torch do are not in it, nor latencies and mispredicted branches:
100 % cannot be reached. The operations of each line are those of the formulas, with a fused multiply-add counted once.
"""

# pyright: reportCallIssue=false
# (numba gives an intrinsic its first argument itself)

from __future__ import annotations

import contextlib
import functools
import mmap
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from splatedit.render import pool, rasterization
from splatedit.render.constants import ALPHA_MAX, ALPHA_MIN, T_STOP
from splatedit.render.simd import LANES, fma, vload, vsplat, vstore

F = np.float32
TILE, BLOCK = 16, 4  # pixels along a tile and along a block of the model
STAGES = ("Gaussians", "order", "pixels", "pixels backward", "Gaussians backward")
STAGES_OF = {"forward": STAGES[:3], "forward+backward": STAGES}

# ---------------------------------------------------------------- the machine


class Speed(NamedTuple):
    """One core of this machine."""

    multiply_adds: float  # 16-lane, per second
    operations: float  # 16-lane, per second, of a mix of multiply-adds and additions
    read: float  # bytes per second from memory
    copy: float  # bytes per second read plus written, to and from memory
    fault: float  # seconds for the first touch of a 4 KiB page


@njit(nogil=True, error_model="numpy")
def _multiply_add(rounds, out):
    m, c = vsplat(F(0.999)), vsplat(F(0.001))
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = a8 = a9 = vload(out, 0)
    for _ in range(rounds):
        a0, a1, a2, a3, a4 = fma(a0, m, c), fma(a1, m, c), fma(a2, m, c), fma(a3, m, c), fma(a4, m, c)
        a5, a6, a7, a8, a9 = fma(a5, m, c), fma(a6, m, c), fma(a7, m, c), fma(a8, m, c), fma(a9, m, c)
    vstore(out, 0, a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9)


@njit(nogil=True, error_model="numpy")
def _mix(rounds, out):
    m, c = vsplat(F(0.999)), vsplat(F(0.001))
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = a8 = a9 = vload(out, 0)
    for _ in range(rounds):
        a0, a1, a2, a3, a4 = fma(a0, m, c), fma(a1, m, c), fma(a2, m, c), fma(a3, m, c), fma(a4, m, c)
        a5, a6, a7, a8, a9 = c - a5, c - a6, c - a7, c - a8, c - a9
    vstore(out, 0, a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9)


@njit(nogil=True, error_model="numpy")
def _read(source, out):
    a0 = a1 = a2 = a3 = vsplat(F(0))
    for i in range(0, len(source) - 4 * LANES + 1, 4 * LANES):
        a0, a1 = a0 + vload(source, i), a1 + vload(source, i + LANES)
        a2, a3 = a2 + vload(source, i + 2 * LANES), a3 + vload(source, i + 3 * LANES)
    vstore(out, 0, a0 + a1 + a2 + a3)


@njit(nogil=True, error_model="numpy")
def _copy(source, target):
    for i in range(0, len(source) - LANES + 1, LANES):
        vstore(target, i, vload(source, i))


def _seconds(function: Callable[..., object], *args: object) -> float:
    """The shortest of nine calls, after one that compiles."""
    function(*args)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    return min(times)


def _fault() -> float:
    pages = 4096
    memory = np.frombuffer(mmap.mmap(-1, pages * 4096), np.uint8)
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    memory[::4096] = 1
    spent = time.process_time() - start
    return spent / max(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults, 1)


@functools.cache
def bandwidth(size: int) -> float:
    """Bytes per second of one core, read plus written, while all of torch's threads copy `size` bytes in all."""
    threads = torch.get_num_threads()
    half = int(min(max(size, 2**18), 2**28)) // 8 // threads
    with ThreadPoolExecutor(threads) as workers:
        arrays = [(np.ones(half, F), np.ones(half, F)) for _ in range(threads)]
        _copy(*arrays[0])  # compiles
        seconds = list(workers.map(lambda pair: _seconds(_copy, *pair), arrays))
    return 8 * half * threads / sum(seconds)


@functools.cache
def speed() -> Speed:
    """Measured, in a second or two."""
    out, rounds, large = np.ones(64, F), 200_000, np.ones(2**26, F)
    fmas, mix = (10 * rounds * LANES / 16 / _seconds(f, rounds, out) for f in (_multiply_add, _mix))
    return Speed(fmas, mix, large.nbytes / _seconds(_read, large, out), bandwidth(2**28), _fault())


# ---------------------------------------------------------------- the work of a scene


class Work(NamedTuple):
    """What is to be done for a picture, counted exactly, summed over cameras."""

    gaussians: int
    visible: int
    pairs: int  # (tile, Gaussian) where the rectangle around the ellipse touches the tile
    live_pairs: int  # of these, before all pixels of the tile have ended
    hit: int  # 4x4 blocks with a pixel that a live pair colours or ends
    missed: int  # live 4x4 blocks in the rectangle without
    lanes: int  # pixels that live pairs colour
    hit_backward: int  # blocks that are coloured
    missed_backward: int  # missed, in front of the block's last contributor
    pixels: int
    sh_bytes: int  # coefficients of one Gaussian


@njit(error_model="numpy")
def _count(order, means2d, conics, opacities, radii, width, height, alpha_max):
    """counts[pairs, live pairs, hit, missed, lanes, hit backward, missed backward] of the Gaussians of one camera.

    Nearest first, one Gaussian after the other on the whole picture: every pixel sees the order that its tile sees.
    """
    counts = np.zeros(7, np.int64)
    t = np.ones((height, width))
    columns, across = (width + TILE - 1) // TILE, (width + BLOCK - 1) // BLOCK
    rows, down = (height + TILE - 1) // TILE, (height + BLOCK - 1) // BLOCK
    live_in_tile, live_in_block = np.zeros((rows, columns), np.int64), np.zeros((down, across), np.int64)
    for y in range(height):
        for x in range(width):
            live_in_tile[y // TILE, x // TILE] += 1
            live_in_block[y // BLOCK, x // BLOCK] += 1
    waiting = np.zeros((down, across), np.int64)  # missed since the last contributor
    for i in order:
        a, b, c, opacity = conics[i, 0], conics[i, 1], conics[i, 2], opacities[i]
        square = 2 * max(np.log(opacity / ALPHA_MIN), 0.0) / max(a * c - b * b, 1e-30)
        half_x, half_y = min(np.sqrt(square * c), radii[i, 0]), min(np.sqrt(square * a), radii[i, 1])
        mx, my = means2d[i, 0] - 0.5, means2d[i, 1] - 0.5
        x0, x1 = max(int(np.ceil(mx - half_x)), 0), min(int(np.floor(mx + half_x)), width - 1)
        y0, y1 = max(int(np.ceil(my - half_y)), 0), min(int(np.floor(my + half_y)), height - 1)
        if x1 < x0 or y1 < y0:
            continue
        for row in range(y0 // TILE, y1 // TILE + 1):
            for column in range(x0 // TILE, x1 // TILE + 1):
                counts[0] += 1
                counts[1] += live_in_tile[row, column] > 0
        for row in range(y0 // BLOCK, y1 // BLOCK + 1):
            for column in range(x0 // BLOCK, x1 // BLOCK + 1):
                if live_in_block[row, column] == 0:
                    continue
                colours, ends = 0, 0
                for y in range(max(row * BLOCK, y0), min(row * BLOCK + BLOCK - 1, y1) + 1):
                    for x in range(max(column * BLOCK, x0), min(column * BLOCK + BLOCK - 1, x1) + 1):
                        dx, dy = mx - x, my - y
                        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
                        alpha = min(opacity * np.exp(-sigma), alpha_max)
                        if t[y, x] < 0 or sigma < 0 or alpha < ALPHA_MIN:
                            continue
                        if t[y, x] * (1 - alpha) <= T_STOP:
                            t[y, x] = -1
                            ends += 1
                        else:
                            t[y, x] *= 1 - alpha
                            colours += 1
                counts[2 if colours + ends else 3] += 1
                counts[4] += colours
                live_in_block[row, column] -= ends
                live_in_tile[row * BLOCK // TILE, column * BLOCK // TILE] -= ends
                if colours:
                    counts[5] += 1
                    counts[6] += waiting[row, column]
                    waiting[row, column] = 0
                else:
                    waiting[row, column] += 1
    return counts


def work_of(scene: dict[str, Any]) -> Work:
    """Counted from what `rasterization` returns, not from its internals. scene: arguments of `rasterization`."""
    with torch.no_grad():
        meta = rasterization(**scene)[2]
    cameras, n = meta["radii"].shape[:2]
    counts, visible = np.zeros(7, np.int64), 0
    for c in range(cameras):
        seen = (meta["radii"][c] > 0).all(-1)
        order = torch.argsort(meta["depths"][c], stable=True)
        order = order[seen[order]].numpy()
        means2d, conics, opacities, radii = (
            meta[k][c].double().numpy() for k in ("means2d", "conics", "opacities", "radii")
        )
        counts += _count(order, means2d, conics, opacities, radii, meta["width"], meta["height"], ALPHA_MAX)
        visible += len(order)
    pixels = cameras * meta["width"] * meta["height"]
    degree = scene.get("sh_degree") or 0
    pairs, live, hit, missed, lanes, hit_backward, missed_backward = map(int, counts)
    return Work(n * cameras, visible, pairs, live, hit, missed, lanes, hit_backward, missed_backward, pixels,
                12 * (degree + 1) ** 2)  # fmt: skip


# ---------------------------------------------------------------- the limit


def needs(w: Work) -> dict[str, tuple[float, float]]:
    """16-lane operations and bytes of each stage: the table at the top of this file."""
    blocks, blocks_backward = 33 * w.hit + 8 * w.missed, 64 * w.hit_backward + 8 * w.missed_backward
    v, p, q, sh = w.visible, w.pairs, w.live_pairs, w.sh_bytes
    return {
        "Gaussians": (20 * v, 80 * w.gaussians + (68 + sh) * v),
        "order": (0, 116 * v + 8 * p),
        "pixels": (blocks + 12 * q, 68 * q + 28 * w.pixels),
        "pixels backward": (blocks_backward + 60 * q, 132 * q + 32 * w.pixels),
        "Gaussians backward": (40 * v + p, (44 + sh) * w.gaussians + (96 + sh) * v + 64 * p),
    }


def limits(work: Work, rate: float | None = None) -> dict[str, float]:
    """CPU milliseconds of each stage at the limit. rate: 16-lane operations per second, if not that of the mix."""
    stages, rate = needs(work), rate or speed().operations
    per_second = bandwidth(sum(size for _, size in stages.values()))
    return {name: 1e3 * (ops / rate + size / per_second) for name, (ops, size) in stages.items()}


# ---------------------------------------------------------------- where the time goes

# a kernel belongs to the first stage one of whose words is in its name; the words follow splatedit/render/*.py
_WORDS = {
    "Gaussians backward": ("add_pairs", "project_backward", "color_backward", "gaussians_backward"),
    "pixels backward": ("composite_backward", "background_backward"),
    "pixels": ("composite",),
    "order": ("depth", "bucket", "sort", "order", "count_", "list_", "tile"),
    "Gaussians": ("project", "color", "pack"),
}


def stage_of(kernel: str) -> str:
    """The stage of the model that a kernel of the renderer belongs to; its own name where none fits."""
    return next((stage for stage, words in _WORDS.items() if any(w in kernel for w in words)), kernel)


@contextlib.contextmanager
def stage_times() -> Iterator[dict[str, float]]:
    """CPU seconds by stage, added up while the context lasts: kernels are watched where they are started."""
    times: dict[str, float] = {}
    run = pool.run

    def timed(kernel: Any, *args: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return run(kernel, *args, **options)
        finally:
            stage = stage_of(getattr(kernel, "__name__", "other"))
            times[stage] = times.get(stage, 0.0) + time.process_time() - start

    pool.run = timed
    try:
        yield times
    finally:
        pool.run = run
