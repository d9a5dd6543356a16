"""Mutated files of every kind, read under guard: `python tests/fuzz.py --files 20000 --seed 0` prints a table.

Every file has to end as sound data or as one InputError of one line. Workers are forked; in each, one file may take
5 seconds of processor time and 4 times the memory of the sound file it was made from (measured, plus ALLOWANCE), opens
nothing outside of its folder, writes nothing, starts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fuzz_files import CANARY, SECRET, SUBJECTS, Files, Subject, mutated, samples

from splatedit.cameras import Cameras
from splatedit.errors import InputError, LossWarning
from splatedit.gaussians import SH_REST, Gaussians

SECONDS = 5.0  # of processor time for one file
PATIENCE = 60.0  # of the clock, for what sleeps; the machine may be busy
TIMES = 4  # as much memory as the sound file needed
ALLOWANCE = 8 << 20  # bytes beyond that: stacks of reading threads, a codec's tables, the allocator's pages
BACKSTOP = 4 << 30  # bytes of address space, so that a lying file cannot hurt the machine
FINE = ("read", "refused")


class Result(NamedTuple):
    """How one mutated file ended."""

    subject: str
    index: int
    verdict: str  # of FINE, or what went wrong
    detail: str
    seconds: float = 0.0  # of processor time
    memory: int = 0  # bytes at the peak
    need: int = 0  # bytes that were honest


# ------------------------------------------------------------------------------------------------------------ one file

LIBC = ctypes.CDLL(None)


def status(key: str) -> int:
    """Bytes from /proc/self/status."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def measured(call: Callable[[], Any]) -> tuple[Any, int, float]:
    """What the call gives, the bytes of memory it took at its peak, and its processor time in seconds."""
    LIBC.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
    except OSError:  # not allowed everywhere; then only what exceeds all before is seen
        before = status("VmHWM")
    start = time.process_time()
    result = call()
    return result, max(0, status("VmHWM") - before), time.process_time() - start


class Watch:
    """What the file made Python do that reading does not."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on = self.anywhere = False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path, flags = os.fsdecode(args[0]), args[2] or 0
            outside = not self.anywhere and (SECRET in path or path.startswith("/etc"))
            if outside or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.seen.append(f"opened {path}")
        elif event.startswith(
            ("os.system", "os.exec", "os.posix_spawn", "os.remove", "os.rename", "os.mkdir", "subprocess")
        ):
            self.seen.append(event)
        elif event.startswith(("socket.connect", "pickle.find_class", "shutil.", "ctypes.dlopen")):
            self.seen.append(event)


def unsound(result: Any) -> str:
    """What is wrong with what was read; "" if nothing is."""
    if isinstance(result, Gaussians):
        n, k = result.n, result.shN.shape[1]
        shapes = {
            "means": (n, 3),
            "quats": (n, 4),
            "scales": (n, 3),
            "opacities": (n,),
            "sh0": (n, 1, 3),
            "shN": (n, k, 3),
        }
        for name, value in result.parameters.items():
            if tuple(value.shape) != shapes[name] or value.dtype != torch.float32 or not value.isfinite().all():
                return f"{name}: {tuple(value.shape)} {value.dtype}, finite: {bool(value.isfinite().all())}"
        if n == 0 or k not in SH_REST.values() or not result.quats.any(1).all():
            return f"{n} Gaussians, {k} rows of SH, or a quaternion of length 0"
        rows = {len(column) for column in result.extra.values()}
        return (
            ""
            if rows <= {n} and result.means.untyped_storage().nbytes() <= 16 * n + 64
            else "extra columns, or shared memory"
        )
    if isinstance(result, Cameras):
        fine = result.w2c.isfinite().all() and result.K.isfinite().all() and (result.K[:, [0, 1], [0, 1]] > 0).all()
        return "" if fine and result.n > 0 else "cameras with NaN, infinity or no focal length"
    if isinstance(result, torch.Tensor):
        return (
            "" if result.dtype == torch.bool and result.shape == (300,) else f"a mask of {result.dtype} {result.shape}"
        )
    return ""


def blame(error: InputError) -> tuple[str, str]:
    """Verdict and detail of an error: refused, unless it is not one line, or came of memory that was not there."""
    text = str(error)
    if len(text.splitlines()) != 1 or not text.isprintable() or len(text) > 2000:
        return "message", f"{len(text)} characters, not one short printable line: {text[:300]!r}"
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, MemoryError) or "allocate memory" in str(chain):
            return "memory", f"ran out: {text[:300]}"
        chain = chain.__cause__ or chain.__context__
    return "refused", text


def attempt(read: Callable[[Path], Any], path: Path) -> tuple[str, str, int]:
    """Verdict, detail, and the bytes of the Gaussians that were read."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result = read(path)
    except InputError as error:
        verdict, detail = blame(error)
        return verdict, detail, 0
    except BaseException as error:
        where = "".join(traceback.format_exception(error)).splitlines()
        return (
            "exception",
            f"{type(error).__name__}: {str(error)[:200]} | " + " | ".join(line.strip() for line in where[-9:-1]),
            0,
        )
    wrong = unsound(result)
    others = [str(w.message) for w in told if not issubclass(w.category, LossWarning)]
    if wrong or others:
        return ("unsound", wrong, 0) if wrong else ("warning", others[0][:300], 0)
    own = result.parameters.values() if isinstance(result, Gaussians) else ()
    return "read", "", sum(value.nbytes for value in own)


class Guard:
    """Reads one case after the other in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.case = folder, folder / "case"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / SECRET).write_bytes(b"not yours")
        self.watch = Watch()
        self.warmed: set[str] = set()
        self.needs: dict[tuple[str, int], int] = {}
        LIBC.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: what is freed goes back, and the next peak is seen
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + BACKSTOP, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def put(self, files: Files) -> None:
        """The case's folder, with these files alone."""
        shutil.rmtree(self.case, ignore_errors=True)
        for name, content in files.items():
            path = self.case / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def read(self, subject: Subject, files: Files) -> tuple[str, str, int, int, float]:
        """Verdict, detail, bytes of what was read, peak and seconds of one case."""
        self.put(files)
        self.watch.seen, self.watch.anywhere = [], subject.anywhere
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            (verdict, detail, own), memory, seconds = measured(
                lambda: self.watched(subject.read, self.case / subject.given)
            )
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        if (self.folder / CANARY).exists():
            (self.folder / CANARY).unlink()
            verdict, detail = "code", "the canary sings"
        elif self.watch.seen:
            verdict, detail = "outside", "; ".join(self.watch.seen[:5])
        return verdict, detail, own, memory, seconds

    def watched(self, read: Callable[[Path], Any], path: Path) -> tuple[str, str, int]:
        self.watch.on = True
        try:
            return attempt(read, path)
        finally:
            self.watch.on = False

    def warm(self, name: str) -> None:
        """Read a sound file of a kind that is new here: imports and codecs' tables are nobody's need."""
        if name not in self.warmed:
            self.read(SUBJECTS[name], samples(name)[0])
            self.warmed.add(name)

    def need(self, name: str, chosen: int) -> int:
        """Bytes of memory that a sound file takes, the least of three readings."""
        if (name, chosen) not in self.needs:
            self.needs[name, chosen] = min(self.read(SUBJECTS[name], samples(name)[chosen])[3] for _ in range(3))
        return self.needs[name, chosen]

    def case_of(self, name: str, seed: int, index: int) -> Result:
        """How mutated file `index` of a subject ends. A larger file may take more, and so may more sound Gaussians."""
        self.warm(name)
        chosen, files = mutated(name, seed, index)
        verdict, detail, own, memory, seconds = self.read(SUBJECTS[name], files)
        if memory <= ALLOWANCE:
            return Result(name, index, verdict, detail, seconds, memory)
        size, before = (sum(map(len, case.values())) for case in (files, samples(name)[chosen]))
        need = max(int(self.need(name, chosen) * max(1.0, size / before)), own)
        if verdict in FINE and memory > TIMES * need + ALLOWANCE:
            verdict, detail = "memory", f"{memory >> 10} KiB, the sound file takes {need >> 10}; {verdict}: {detail}"
        return Result(name, index, verdict, detail, seconds, memory, need)


# ------------------------------------------------------------------------------------------------------------- workers

Job = tuple[str, int]  # subject, index


def work(connection: Connection, folder: Path, seed: int) -> None:
    """A worker: one job in, one Result out, until None comes."""
    torch.set_num_threads(1)  # OpenMP's threads did not survive the fork
    faulthandler.disable()  # the end of a worker is a Result, not a page of text
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        guard = Guard(folder)
        while (job := connection.recv()) is not None:
            connection.send(guard.case_of(job[0], seed, job[1]))


def died(job: Job, code: int | None) -> Result:
    """What the end of a worker says of the file it read."""
    ends = {-signal.SIGPROF: f"over {SECONDS:.0f} s of processor time", -signal.SIGALRM: f"over {PATIENCE:.0f} s"}
    return Result(*job, "hang", ends[code]) if code in ends else Result(*job, "crash", f"the worker ended with {code}")


def run(jobs: Sequence[Job], seed: int, folder: Path, workers: int = 2) -> Iterator[Result]:
    """Read all mutated files in forked workers; a worker that dies is replaced."""
    context = multiprocessing.get_context("fork")
    for name in {name for name, _ in jobs}:
        samples(name)  # once, for all workers
    todo, busy = list(reversed(jobs)), {}

    def start(number: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, folder / f"worker{number}", seed), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads about; they are idle
            process.start()
        theirs.close()
        job = todo.pop()
        ours.send(job)
        busy[ours] = (process, number, job)

    for number in range(min(workers, len(jobs))):
        start(number)
    while busy:
        for connection in wait(list(busy)):
            process, number, job = busy.pop(connection)
            try:
                yield connection.recv()
            except (EOFError, ConnectionResetError):
                process.join()
                if process.exitcode == 1:
                    raise RuntimeError(f"the harness itself failed at {job}; see above") from None
                yield died(job, process.exitcode)
                if todo:
                    start(number)
                continue
            next_job = todo.pop() if todo else None
            connection.send(next_job)
            if next_job:
                busy[connection] = (process, number, next_job)
            else:
                process.join()


def plan(files: int, subjects: Sequence[str], first: int = 0) -> list[Job]:
    """`files` jobs, the same number for each subject, in turn."""
    each = -(-files // len(subjects))
    return [(name, first + i) for i in range(each) for name in subjects][:files]


# --------------------------------------------------------------------------------------------------------------- table


def table(results: Sequence[Result]) -> str:
    """One row for each subject: counts, the slowest file, the most memory."""
    rows = ["kind             files   read  refused  failed  slowest s  peak MiB  peak / need"]
    for name in [*dict.fromkeys(r.subject for r in results), "all"]:
        own = [r for r in results if name in (r.subject, "all")]
        counts = Counter(r.verdict for r in own)
        failed = sum(counts.values()) - counts["read"] - counts["refused"]
        ratio = max((r.memory / r.need for r in own if r.memory > ALLOWANCE and r.need), default=0)
        shown = f"{ratio:.1f}" if ratio else f"< {ALLOWANCE >> 20} MiB"
        slowest, peak = max(r.seconds for r in own), max(r.memory for r in own) / 2**20
        rows.append(
            f"{name:<16} {len(own):>5}  {counts['read']:>5}  {counts['refused']:>7}  {failed:>6}  {slowest:>9.2f}  "
            f"{peak:>8.1f}  {shown:>11}"
        )
    return "\n".join(rows)


def failures(results: Sequence[Result]) -> list[str]:
    """One line for each file that ended badly."""
    return [f"{r.subject}:{r.index} {r.verdict}: {r.detail}" for r in results if r.verdict not in FINE]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="mutated files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file of each kind")
    parser.add_argument("--kinds", default=",".join(SUBJECTS), help="names separated by commas")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--show", metavar="KIND:INDEX", help="write one mutated file to ./fuzz-case and stop")
    args = parser.parse_args()
    if args.show:
        name, _, index = args.show.partition(":")
        for file, content in mutated(name, args.seed, int(index))[1].items():
            path = Path("fuzz-case") / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return 0
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for result in run(plan(args.files, args.kinds.split(","), args.first), args.seed, Path(folder), args.workers):
            results.append(result)
            if result.verdict not in FINE:
                print(failures([result])[0], flush=True)
    print(table(sorted(results, key=lambda r: list(SUBJECTS).index(r.subject))))
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
