"""The CPU renderer side by side with others and with what the machine could do, in one run.

    python benchmarks/raster.py                                  # table and limit, about ten minutes
    python benchmarks/raster.py --rows 10kx256 100kx512          # Gaussians x pixels; 1Mx1920x1080 works too
    python benchmarks/raster.py --peer OLD/splatedit/render/__init__.py     # any file with gsplat's `rasterization`
    python benchmarks/raster.py --growth --threads --cameras --gpu  # other measurements, instead of table and limit
    python benchmarks/raster.py --all --save benchmarks/results/raster-MACHINE.txt

start.py beside it measures how long a new process takes to its first picture.

All pictures are RGB and expected depth, SH of degree 3, antialiased, with a background; gradients go to means, quats,
scales, opacities and colours. Times are medians of repeats in which all participants take turns. CPU time is summed
over threads: on a machine with other work compare that, and only within one run. Extra memory is the rise of the peak
above what the process held before the call, in a process of its own, gradients included. "of limit": raster_limit.py.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: its idle threads would count as CPU time

import argparse
import ctypes
import datetime
import gc
import itertools
import json
import math
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the package of this checkout, not one that is installed
sys.path.insert(0, str(Path(__file__).parent))

import raster_limit
from raster_peers import LEAVES, Renderer, Scene, ball, participants

from splatedit import __version__
from splatedit.errors import InputError
from splatedit.render import rasterization

ROWS = ("1kx64", "1kx512", "10kx64", "10kx256", "10kx512", "100kx64", "100kx256", "100kx512", "1Mx64", "1Mx512")
LIMIT_ROWS = ("10kx256", "100kx256", "100kx512", "1Mx512")
COUNTS, SIDES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000, 5_000_000), (256, 512, 1024, 2048)
PASSES = ("forward", "forward+backward")
QUICK = 50.0  # ms
PATIENCE = 6.0  # seconds for one participant in one row; it gets fewer repeats then

Call = Callable[[], Any]


class Row(NamedTuple):
    gaussians: int
    width: int
    height: int

    @property
    def cells(self) -> tuple[str, str]:
        n = self.gaussians
        count = next((f"{n / unit:g}{letter}" for unit, letter in ((1e6, "M"), (1e3, "k")) if n >= unit), str(n))
        return count, str(self.width) if self.width == self.height else f"{self.width}x{self.height}"


def row(text: str) -> Row:
    """100kx512, 1Mx1920x1080."""
    n, width, *height = text.split("x")
    count = float(n.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(n[-1], 1)
    return Row(int(count), int(width), int(height[0] if height else width))


def aligned(head: Sequence[str], *cells: object) -> str:
    """One line of a table whose columns are as wide as the words of its head, or the head itself."""
    return " | ".join(str(cell).rjust(len(name)) for name, cell in zip(head, cells or head, strict=True))


# ---------------------------------------------------------------- measuring


class Timing(NamedTuple):
    """Medians."""

    wall: float  # ms
    cpu: float  # ms, summed over threads
    faults: float  # page faults


def once(function: Call) -> Timing:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wall, cpu = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)
    return Timing(wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)


def race(functions: dict[Any, Call], repeats: int) -> dict[Any, Timing]:
    """All take turns, in an order that changes. The first round warms up; it counts only for what exceeds PATIENCE.

    A quick call follows an unmeasured one of its own, so that nobody pays for what another left of the caches.
    """
    samples: dict[Any, list[Timing]] = {key: [] for key in functions}
    spent = dict.fromkeys(functions, 0.0)
    turns = [
        key for round in range(repeats + 1) for key in random.Random(round).sample(list(functions), len(functions))
    ]
    for key, function in ((key, functions[key]) for key in turns):
        if spent[key] > 1e3 * PATIENCE and samples[key]:
            continue
        if samples[key] and samples[key][-1].wall < QUICK:
            function()
        sample = once(function)
        if spent[key] or sample.wall > 1e3 * PATIENCE:
            samples[key].append(sample)
        spent[key] += sample.wall
    return {key: Timing(*map(statistics.median, zip(*timings, strict=True))) for key, timings in samples.items()}


def passes_of(renderer: Renderer, scene: Scene) -> dict[str, Call]:
    """Forward as inference does it; forward and backward with the same upstream gradients for everybody."""
    scene = scene | renderer.mode
    leaves = [scene[name].requires_grad_() for name in LEAVES]
    upstream: list[torch.Tensor] = []

    def forward() -> Any:
        with torch.no_grad():
            return renderer.draw(scene)

    def both() -> Any:
        outputs = [t for t in renderer.draw(scene) if t is not None]
        if not upstream:
            rng = torch.Generator().manual_seed(1)
            upstream.extend(torch.randn(t.shape, generator=rng).to(t) for t in outputs)
        return torch.autograd.grad(outputs, leaves, upstream)

    return {"forward": forward, "forward+backward": both}


def scene_of(r: Row, count: int = 1) -> Scene:
    return ball(r.gaussians, r.width, r.height, count=count)


def warm(renderer: Renderer) -> Renderer:
    """Compiled and loaded by a small picture."""
    for function in passes_of(renderer, ball(300, 32, 32)).values():
        function()
    return renderer


def repeats_for(r: Row, options: argparse.Namespace) -> int:
    return options.repeats or (25 if r.gaussians <= 10_000 else 9 if r.gaussians <= 100_000 else 5)


# ---------------------------------------------------------------- memory


def memory(options: argparse.Namespace, name: str, r: Row, passes: Sequence[str] = PASSES) -> dict[str, int]:
    """Extra MiB at the peak of each pass, in a process of its own; nothing where the system cannot tell."""
    if options.no_memory:
        return {}
    command = [sys.executable, __file__, "--memory-of", json.dumps([name, r, passes])]
    command += [f"--num-threads={options.num_threads}", *(f"--peer={path}" for path in options.peer)]
    command += [f"--opensplat={options.opensplat}"] if options.opensplat else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} at {r}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def measure_memory(options: argparse.Namespace) -> dict[str, int]:
    """What that process does."""
    name, numbers, passes = json.loads(options.memory_of)
    renderer = next(p for p in participants(options.peer, options.opensplat) if p.name == name)
    functions = passes_of(warm(renderer), scene_of(Row(*numbers)))
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what is freed but kept goes back, or it would be used and not be seen
    before, extra = resident("VmRSS"), {}
    for which in passes:
        if not reset_peak():
            return {}
        functions[which]()
        extra[which] = round((resident("VmHWM") - before) / 1024)
    return extra


def resident(field: str) -> float:
    """KiB of memory held now, VmRSS, or at the peak, VmHWM; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines() if os.path.exists("/proc/self/status") else []
    return next((float(line.split()[1]) for line in lines if line.startswith(field)), math.nan)


def reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


# ---------------------------------------------------------------- what is printed: each section yields its lines


def header(options: argparse.Namespace) -> Iterator[str]:
    import numba

    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    yield f"splatedit {__version__} renderer, {datetime.datetime.now():%Y-%m-%d %H:%M}"
    yield f"{cpu}, {os.cpu_count()} cores; {options.num_threads} threads; load {load:.1f}"
    yield (
        f"Python {platform.python_version()}, torch {torch.__version__}, numba {numba.__version__}, "
        f"{platform.system()} {platform.machine()}, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}"
    )
    if load > 0.3 * (os.cpu_count() or 1):
        yield f"WARNING: load {load:.1f} before the start: compare CPU times and ratios, not wall times"


def meet(options: argparse.Namespace) -> Iterator[str]:
    """Everybody is made ready; says who is left out, which only those may be that nobody asked for."""
    options.everybody = []
    for renderer in participants(options.peer, options.opensplat):
        try:
            options.everybody.append(warm(renderer))
        except Exception as error:
            if not renderer.uninvited:
                raise
            yield f"{renderer.name} left out: {type(error).__name__}: {error}"


def table(options: argparse.Namespace) -> Iterator[str]:
    """Everybody in every row they can bear."""
    head = ("gaussians", "   pixels", " " * 12 + "pass", " " * 14 + "renderer", "  CPU ms", " wall ms", "CPU / ours")
    head += ("extra MiB", "of limit", "differs")
    yield aligned(head)
    for r in options.rows:
        scene = scene_of(r)
        able = [p for p in options.everybody if p.bears(r.gaussians, r.width * r.height)]
        functions = {(which, p.name): f for p in able for which, f in passes_of(p, scene).items()}
        timings = race(functions, repeats_for(r, options))
        limits = raster_limit.limits(raster_limit.work_of(scene))
        differs = {p.name: difference(functions, p) for p in able}
        sizes = {p.name: memory(options, p.name, r) for p in able}
        for which, p in itertools.product(PASSES, able):
            cpu = timings[which, p.name].cpu
            share = sum(limits[stage] for stage in raster_limit.STAGES_OF[which]) / cpu
            yield aligned(
                head, *r.cells, which, p.name, f"{cpu:.1f}", f"{timings[which, p.name].wall:.1f}",
                f"{cpu / timings[which, p.against].cpu:.2f}", sizes[p.name].get(which, "-"),
                "-" if p.mode else f"{share:.1%}", f"{differs[p.name]:.0e}",
            )  # fmt: skip


def difference(functions: dict[Any, Call], p: Renderer) -> float:
    """Largest difference of a value of the picture, so that nobody is fast by drawing something else.

    An alpha may fall on either side of 1/255 by rounding: single values that differ by 1e-3 are no mistake.
    """
    one, other = (functions["forward", name]()[0] for name in (p.name, p.against))
    return (one - other).abs().max().item()


def limit(options: argparse.Namespace) -> Iterator[str]:
    """Stage by stage, forward and backward in one call."""
    s = raster_limit.speed()
    yield (
        f"one core: {s.multiply_adds / 1e9:.2f}e9 multiply-adds/s, {s.operations / 1e9:.2f}e9 operations/s mixed with "
        f"additions, of 16 lanes each; {s.read / 1e9:.0f} GB/s read, {s.copy / 1e9:.0f} GB/s copied; "
        f"page fault {1e6 * s.fault:.1f} us"
    )
    for r in options.limit_rows:
        scene = scene_of(r)
        work = raster_limit.work_of(scene)
        limits = raster_limit.limits(work)
        both = passes_of(options.everybody[0], scene)["forward+backward"]
        timing, times = by_stage(both, repeats_for(r, options))
        yield (
            f"{' Gaussians, '.join(r.cells)} px: {work.visible} visible, {work.pairs} pairs ({work.live_pairs} live), "
            f"blocks {work.hit} hit and {work.missed} missed, {work.lanes / max(16 * work.hit, 1):.0%} of lanes used"
        )
        head = (" " * 14 + "stage", "limit ms", "  CPU ms", "of limit")
        yield aligned(head)
        for stage in dict.fromkeys([*limits, *times]):
            bound, spent = limits.get(stage, 0.0), times.get(stage, 0.0)
            yield aligned(head, stage, f"{bound:.2f}", f"{spent:.2f}", f"{bound / spent if spent else 0:.0%}")
        total = sum(limits.values())
        yield aligned(head, "all", f"{total:.2f}", f"{timing.cpu:.2f}", f"{total / timing.cpu:.0%}")
        slower = sum(raster_limit.limits(work, s.multiply_adds).values())
        yield (
            f"at the rate of multiply-adds alone {slower:.2f} ms, {slower / timing.cpu:.0%}; page faults: "
            f"{timing.faults:.0f}, about {1e3 * timing.faults * s.fault:.1f} ms, not in the limit"
        )


def by_stage(function: Call, repeats: int) -> tuple[Timing, dict[str, float]]:
    """Medians: of the whole call, and CPU ms of each stage, the rest being torch, Python, and what they touch first."""
    timing, samples = race({0: function}, repeats)[0], []
    for _ in range(repeats):
        with raster_limit.stage_times() as times:
            total = once(function).cpu
        spent = {stage: 1e3 * seconds for stage, seconds in times.items()}
        samples.append(spent | {"torch and Python": total - sum(spent.values())})
    return timing, {stage: statistics.median(sample.get(stage, 0.0) for sample in samples) for stage in samples[0]}


def growth(options: argparse.Namespace) -> Iterator[str]:
    """With more Gaussians at 512 px, and with more pixels; and the memory of the largest."""
    middle = options.counts[len(options.counts) // 2]
    yield from grow("visible Gaussians", [Row(n, 512, 512) for n in options.counts], options)
    yield from grow("pixels of picture", [Row(middle, side, side) for side in options.sides], options)
    largest = Row(max(options.counts), 1024, 1024)
    own = 4 * 59 * largest.gaussians / 2**20  # 59 numbers each
    extra = memory(options, "splatedit", largest, ("forward",)).get("forward", "?")
    yield f"{' Gaussians, '.join(largest.cells)} px, forward: {extra} MiB beside the {own:.0f} MiB of the scene"


def grow(what: str, rows: list[Row], options: argparse.Namespace) -> Iterator[str]:
    """Per visible Gaussian or per pixel, relative to the middle row too; and over the nearest straight line a + b x."""
    amounts, timings = [], []
    for r in rows:
        scene = scene_of(r)
        work = raster_limit.work_of(scene)
        amounts.append(work.visible if what == "visible Gaussians" else work.pixels)
        timings.append(race(passes_of(options.everybody[0], scene), repeats_for(r, options)))
    head = ("gaussians", "   pixels", " " * 12 + "pass", what, "  CPU ms", " ns each", "/ middle", "/ line")
    head += ("page faults",)
    yield aligned(head)
    for which in PASSES:
        times = [timing[which].cpu for timing in timings]
        each = [1e6 * t / x for t, x in zip(times, amounts, strict=True)]
        for i, line in enumerate(line_through(amounts, times)):
            yield aligned(
                head, *rows[i].cells, which, amounts[i], f"{times[i]:.1f}", f"{each[i]:.1f}",
                f"{each[i] / each[len(each) // 2]:.2f}", f"{times[i] / line:.2f}", round(timings[i][which].faults),
            )  # fmt: skip


def line_through(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Values at x of the line a + b x whose relative distances to y are least in squares."""
    columns = torch.tensor([[1.0, value] for value in x], dtype=torch.float64)
    scale = torch.tensor(y, dtype=torch.float64)[:, None]
    fit = torch.linalg.lstsq(columns / scale, torch.ones_like(scale)).solution
    return (columns @ fit)[:, 0].tolist()


def threads(options: argparse.Namespace) -> Iterator[str]:
    """The same call on one thread and on all."""
    head = ("gaussians", "   pixels", " " * 12 + "pass", "threads", "  CPU ms", " wall ms", "times as fast")
    yield aligned(head)
    for r in options.limit_rows:
        passes = passes_of(options.everybody[0], scene_of(r))
        counts = sorted({1, options.num_threads})
        functions = {(which, n): on_threads(n, passes[which]) for which in PASSES for n in counts}
        timings = race(functions, repeats_for(r, options))
        for (which, n), timing in timings.items():
            gain = f"{timings[which, 1].wall / timing.wall:.2f}"
            yield aligned(head, *r.cells, which, n, f"{timing.cpu:.1f}", f"{timing.wall:.1f}", gain)
    torch.set_num_threads(options.num_threads)


def on_threads(n: int, function: Call) -> Call:
    def run() -> Any:
        torch.set_num_threads(n)
        return function()

    return run


def several_cameras(options: argparse.Namespace) -> Iterator[str]:
    """Four cameras in one call against four calls."""
    head = ("gaussians", "   pixels", " " * 12 + "pass", "cameras", "  CPU ms", " wall ms")
    yield aligned(head)
    for r in options.limit_rows:
        together = scene_of(r, 4)
        cameras = [together | {k: together[k][c : c + 1] for k in ("viewmats", "Ks", "backgrounds")} for c in range(4)]
        alone = [passes_of(options.everybody[0], scene) for scene in cameras]
        functions = {(which, "4 in 1"): f for which, f in passes_of(options.everybody[0], together).items()}
        functions |= {(which, "4 x 1"): one_by_one([passes[which] for passes in alone]) for which in PASSES}
        for (which, name), timing in race(functions, repeats_for(r, options)).items():
            yield aligned(head, *r.cells, which, name, f"{timing.cpu:.1f}", f"{timing.wall:.1f}")


def one_by_one(functions: list[Call]) -> Call:
    return lambda: [function() for function in functions]


def gpu(options: argparse.Namespace) -> Iterator[str]:
    """What our wrapper adds to gsplat's own call, by CUDA events, in turn."""
    try:
        import gsplat  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        yield f"not run: gsplat cannot be imported ({error})"
        return
    if not torch.cuda.is_available():
        yield "not run: no CUDA GPU"
        return
    yield f"{torch.cuda.get_device_name()}, gsplat {gsplat.__version__}"
    head = ("gaussians", "   pixels", " " * 12 + "pass", " gsplat ms", "splatedit ms", "overhead")
    yield aligned(head)
    bare = Renderer("gsplat", lambda scene: gsplat.rasterization(**scene, packed=False)[:2])
    own = Renderer("splatedit", lambda scene: rasterization(**scene, backend="gsplat")[:2])
    for r in (Row(100_000, 512, 512), Row(1_000_000, 1920, 1080)):
        scene = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in scene_of(r).items()}
        functions = {(which, p.name): f for p in (bare, own) for which, f in passes_of(p, scene).items()}
        samples: dict[Any, list[float]] = {key: [] for key in functions}
        for turn in range(10 + (options.repeats or 100)):
            for key, function in functions.items():
                milliseconds = by_events(function)
                if turn >= 10:
                    samples[key].append(milliseconds)
        for which in PASSES:
            one, other = (statistics.median(samples[which, p.name]) for p in (bare, own))
            yield aligned(head, *r.cells, which, f"{one:.3f}", f"{other:.3f}", f"{other / one - 1:+.1%}")


def by_events(function: Call) -> float:
    """Milliseconds from the moment the GPU is idle and the call begins until its last kernel has run."""
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


# ---------------------------------------------------------------- the command line

SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "table": table,
    "limit": limit,
    "growth": growth,
    "threads": threads,
    "cameras": several_cameras,
    "gpu": gpu,
}


def busy() -> float:
    """CPU seconds that all processes of this machine have used since it started; NaN where it does not say."""
    if not os.path.exists("/proc/stat"):
        return math.nan
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def watched(section: Iterator[str]) -> Iterator[str]:
    """The section's lines, and at the end what others did with the processors meanwhile."""

    def state() -> tuple[float, float]:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), busy() - sum(usage.ru_utime + usage.ru_stime for usage in usages)

    began, used = state()
    yield from section
    now, used_now = state()
    others = (used_now - used) / (now - began) / (os.cpu_count() or 1)
    if math.isnan(others):
        return
    warning = "; WARNING: not a quiet machine, compare CPU times and ratios only" if others > 0.05 else ""
    yield f"{now - began:.0f} s; others used {max(others, 0):.0%} of the processors meanwhile{warning}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name, section in SECTIONS.items():
        add(f"--{name}", action="store_true", help=(section.__doc__ or "").splitlines()[0])
    add("--all", action="store_true", help="all of these")
    add("--rows", type=row, nargs="+", default=list(map(row, ROWS)), help="of the table: 100kx512 ...")
    add("--limit-rows", type=row, nargs="+", default=list(map(row, LIMIT_ROWS)), help="of limit, threads, cameras")
    add("--counts", type=int, nargs="+", default=COUNTS, help="of Gaussians, for growth")
    add("--sides", type=int, nargs="+", default=SIDES, help="of the picture in pixels, for growth")
    add("--repeats", type=int, help="default: 25, above 10k Gaussians 9, above 100k 5; on a GPU 100")
    add("--num-threads", type=int, default=os.cpu_count(), help="default: one for each core")
    add("--peer", action="append", default=[], metavar="FILE", help="a file with gsplat's `rasterization`; repeatable")
    add("--opensplat", metavar="CHECKOUT", help="compile and time the CPU rasteriser of OpenSplat")
    add("--no-memory", action="store_true", help="skip the processes that measure memory")
    add("--save", type=Path, help="write what is printed to this file, too")
    add("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not any(getattr(options, name) for name in SECTIONS):
        options.table = options.limit = True
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.num_threads)
    if options.memory_of:
        print(json.dumps(measure_memory(options)))
        return
    printed: list[str] = []

    def say(lines: Iterator[str]) -> None:
        for line in lines:
            print(line, flush=True)
            printed.append(line)

    say(header(options))
    say(meet(options))
    for name, section in SECTIONS.items():
        if options.all or getattr(options, name):
            say(iter(["", f"## {name}: {(section.__doc__ or '').splitlines()[0]}", ""]))
            say(watched(section(options)))
    if options.save:
        options.save.write_text("\n".join(printed) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
