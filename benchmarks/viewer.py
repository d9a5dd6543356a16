"""What the viewer costs an edit, how soon it shows something, and how much it sends: asked next to measured.

    python benchmarks/viewer.py [edit] [first] [button] [frames] [looks] [--rounds 8]

edit: seconds per step of an edit of 20,000 Gaussians by the bundled model, alone, with a viewer that nobody looks at,
and with one browser there, in splats and in frames. The four take turns within one edit, a few steps each, in another
order each round; what is told is the median over rounds of a turn against "alone" in the same round: of wall time, of
the CPU time of the process, and of that what the viewer's own threads took (without the helpers that draw frames),
which means something on a machine that does other things as well. first: from the start of `splatedit view` on a file
of 100,000 until a browser that is waiting has all splats, and from the load of the page; likewise frames of a million.
button: from the press of Pause until the edit knows, while it runs. frames: what a browser is sent that looks around a
scene of a million for ten seconds. looks: what each look of a million costs before it is drawn, and what it takes to
find the splats that are seen in a rectangle of a window; the least of the rounds, and of their CPU time.

The browser is a program that reads all it is sent, in a process of its own. A headless Chromium draws with the CPU: on
the same cores it would measure Chromium.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does

ROOT = Path(__file__).parent.parent
WINDOW = (1280, 720)
WARM, STEPS = 2, 4  # steps of a turn that do not count, and that do


class Row(NamedTuple):
    """A line of the result."""

    what: str
    asked: str
    measured: str


# ------------------------------------------------------------------------------------------------- a browser that reads
def camera(angle: float = 0.0, distance: float = 2.5) -> dict[str, Any]:
    """What a browser says of its camera, at this angle (radians) around the middle."""
    half = angle / 2  # about y, looking at the middle from -z at angle 0
    return {
        "type": "ViewerCameraMessage",
        "wxyz": (math.cos(half), 0.0, math.sin(half), 0.0),
        "position": (-distance * math.sin(angle), 0.0, -distance * math.cos(angle)),
        "fov": 0.8,
        "near": 0.01,
        "far": 1000.0,
        "image_width": WINDOW[0],
        "image_height": WINDOW[1],
        "look_at": (0.0, 0.0, 0.0),
        "up_direction": (0.0, 1.0, 0.0),
    }


async def connected(url: str):
    """The websocket of a viewer, after its handshake."""
    import websockets

    protocol: Any = f"viser-v{version('viser')}"
    return await websockets.connect(url.replace("http", "ws", 1), subprotocols=[protocol], max_size=None)


def kinds(message: bytes) -> list[str]:
    """The types of what a message of the server holds."""
    import msgspec
    import zstandard

    size = int.from_bytes(message[8:16], "little")
    inner = zstandard.ZstdDecompressor().decompress(message[16 : 16 + size])
    return [entry["type"] for entry in msgspec.msgpack.decode(inner)["messages"]]


async def look(url: str, seconds: float, move: bool) -> dict[str, Any]:
    """Read for so long, turning the camera 30 times a second if asked; what came, in bytes and frames."""
    import msgspec

    came: dict[str, Any] = {"bytes": 0, "frames": 0, "sizes": []}
    async with await connected(url) as socket:
        await socket.send(msgspec.msgpack.encode(camera()))

        async def read() -> None:
            async for message in socket:
                assert isinstance(message, bytes)
                came["bytes"] += len(message)
                if move:
                    came["frames"] += kinds(message).count("BackgroundImageMessage")
                came["sizes"].append(len(message))

        reader = asyncio.create_task(read())
        if move:
            await asyncio.sleep(5)  # the sharp picture of the first view is not what is asked for
            came.update(bytes=0, frames=0, sizes=[])
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            await asyncio.sleep(1 / 30)
            if move:
                await socket.send(msgspec.msgpack.encode(camera((time.monotonic() - begun) * 0.6)))
        came["seconds"] = time.monotonic() - begun
        reader.cancel()
    return came


@contextmanager
def browser(url: str, *words: str) -> Iterator[subprocess.Popen]:
    """A process that looks at a viewer until the end of the block, or as long as the words say."""
    process = subprocess.Popen([sys.executable, __file__, "--look", url, *words], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


# --------------------------------------------------------------------------------------------------------------- scenes
def scene(n: int) -> Any:
    """The bundled cat, n splats of degree 0: repeated, moved a little, and smaller the more there are."""
    import torch

    from splatedit.files import load

    cat = load(ROOT / "scenes" / "cat.ply")
    times = n / cat.n
    grown = cat.select(torch.arange(n) % cat.n)
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return grown._replace(means=grown.means + 0.005 * noise, scales=grown.scales - max(math.log(times), 0) / 2)


def until(answer: Callable[[], Any], seconds: float = 120.0, pause: float = 0.002) -> Any:
    """The first true answer."""
    end = time.monotonic() + seconds
    while not (found := answer()):
        if time.monotonic() > end:
            raise TimeoutError("nothing happened")
        time.sleep(pause)
    return found


# ----------------------------------------------------------------------------------------------------------- an edit
class Turn(NamedTuple):
    """Some steps of an edit."""

    wall: float  # seconds per step
    cpu: float  # of this process, seconds per step
    own: float  # of that, of the viewer's threads


@contextmanager
def editing(n: int, steps: int) -> Iterator[tuple[Any, Any]]:
    """A viewer and an edit of n Gaussians that holds before its first step."""
    import splatedit
    from splatedit.viewer.app import App
    from splatedit.viewer.stage import opened

    gaussians = scene(n)
    job = splatedit.start(gaussians, "a pig", "a cat", steps=steps)
    job.pause()
    with App(opened(gaussians)) as app:
        yield app, job
        job.stop()
        job.wait(60)


def steps_of(job: Any, count: int) -> Turn:
    """What the next so many steps take."""
    done, wall, cpu, own = job.done, time.perf_counter(), time.process_time(), viewers_own()
    job.step(count)
    until(lambda: job.ended or (job.done == done + count and job.state == "paused"), pause=0.02)  # polling costs, too
    if job.ended:
        raise RuntimeError("the edit has ended") from job.error
    spent = (time.perf_counter() - wall, time.process_time() - cpu, viewers_own() - own)
    return Turn(*(seconds / count for seconds in spent))


def viewers_own() -> float:
    """CPU seconds so far of all Python threads but the edit's, the renderer's and this one; 0 where none can tell."""
    total = 0
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.name.startswith(("splatedit-edit", "splatedit-raster")):
            try:
                total += int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
            except OSError:
                continue
    return total / 1e9


TURNS = ("alone", "viewer", "splats", "frames")


def edit(rounds: int) -> list[Row]:
    """Steps with and without somebody who looks on."""
    taken: list[dict[str, Turn]] = []
    with editing(20_000, (rounds + 1) * len(TURNS) * (WARM + STEPS) + 10) as (app, job):
        now = "alone"
        take = app.act(app.take, newest=True)
        app.job = job
        job.listen(lambda job: None if now == "alone" else take(job))
        steps_of(job, 3)
        for index in range(rounds):
            round_: dict[str, Turn] = {}
            for name in TURNS[index % 4 :] + TURNS[: index % 4]:
                now = name
                app.stage.change(display="frames" if name == "frames" else "splats")
                if name in ("splats", "frames"):
                    with browser(app.url):
                        until(lambda: app.server.get_clients())
                        steps_of(job, WARM)
                        round_[name] = steps_of(job, STEPS)
                    until(lambda: not app.server.get_clients())
                else:
                    steps_of(job, WARM)
                    round_[name] = steps_of(job, STEPS)
            taken.append(round_)
            print(
                "  ",
                {
                    name: f"{turn.wall:.2f} s, {turn.cpu:.2f} s CPU, {1000 * turn.own:.0f} ms own"
                    for name, turn in round_.items()
                },
                flush=True,
            )
    alone = median(turn["alone"].wall for turn in taken)
    rows = [Row("edit of 20,000, a step alone", "", f"{alone:.3f} s")]
    asked = {"viewer": "", "splats": "< 5 %", "frames": "< 5 %"}
    names = {"viewer": "viewer, no browser", "splats": "one browser, splats", "frames": "one browser, frames"}
    for name, want in asked.items():
        wall = median(turn[name].wall / turn["alone"].wall - 1 for turn in taken)
        cpu = median(turn[name].cpu / turn["alone"].cpu - 1 for turn in taken)
        own = median(turn[name].own / turn["alone"].cpu for turn in taken)
        told = f"{100 * wall:+.1f} % wall, {100 * cpu:+.1f} % CPU; CPU of the viewer's threads {100 * own:.1f} %"
        rows.append(Row(f"  slower with {names[name]}", want, told))
    return rows


# --------------------------------------------------------------------------------------------------- the first picture
async def first_of(url: str, size: int, kind: str) -> float:
    """When, on the monotonic clock, the first message of this kind and size has arrived."""
    import msgspec

    async with await connected(url) as socket:
        await socket.send(msgspec.msgpack.encode(camera()))
        async for message in socket:
            assert isinstance(message, bytes)
            if len(message) >= size and kind in kinds(message):
                return time.monotonic()
    raise ConnectionError("the viewer has gone")


def page(url: str) -> None:
    """Load the page."""
    with urllib.request.urlopen(url) as answer:
        answer.read()


def first(rounds: int) -> list[Row]:
    """Seconds until something is on its way to the screen."""
    from splatedit.files import save

    rows = []
    for n, kind, size, asked in (
        (100_000, "GaussianSplatsMessage", 3_200_000, "< 2 s"),
        (1_000_000, "BackgroundImageMessage", 5_000, ""),
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scene.ply"
            save(scene(n), path)
            cold, warm = [], []
            for _ in range(min(rounds, 5 if n < 1e6 else 2)):
                begun = time.monotonic()
                words = [sys.executable, "-m", "splatedit", "view", str(path)]
                process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                try:
                    assert process.stdout is not None
                    url = process.stdout.readline().strip()
                    cold.append(asyncio.run(first_of(url, size, kind)) - begun)
                    time.sleep(3)  # torch is still being imported
                    begun = time.monotonic()
                    page(url)
                    warm.append(asyncio.run(first_of(url, size, kind)) - begun)
                finally:
                    process.terminate()
                    process.wait()
        what = f"{n:,} Gaussians as {'splats' if size > 1e6 else 'frames'}"
        best = f"median {median(cold):.2f} s, least {min(cold):.2f} s"
        rows.append(Row(f"first picture, {what}: from the start of `splatedit view`", asked, best))
        rows.append(Row("  from the load of the page", asked, f"median {median(warm):.2f} s"))
    return rows


# ------------------------------------------------------------------------------------------------------------ a button
def button(rounds: int) -> list[Row]:
    """Milliseconds from the press of Pause until the edit knows that it is to hold."""
    import msgspec

    known, held = [], []
    with editing(20_000, 10_000) as (app, job):
        app.follow(job)
        steps_of(job, 2)
        job.resume()
        handles = app.server.gui._gui_input_handle_from_uuid
        pause = next(uuid for uuid, handle in handles.items() if getattr(handle, "label", "") in ("Pause", "Resume"))
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()

        def wait(task: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(task, loop).result(30)

        async def read(socket: Any) -> None:
            async for _ in socket:
                pass

        socket = wait(connected(app.url))
        wait(socket.send(msgspec.msgpack.encode(camera())))
        asyncio.run_coroutine_threadsafe(read(socket), loop)
        press = msgspec.msgpack.encode({"type": "GuiUpdateMessage", "uuid": pause, "updates": {"value": True}})
        for _ in range(max(rounds, 10)):
            done = job.done
            until(lambda done=done: job.done > done + 1 and job.holds_after is None and handles[pause].label == "Pause")
            begun = time.monotonic()
            wait(socket.send(press))
            until(lambda: job.holds_after is not None, pause=0.0005)
            known.append(time.monotonic() - begun)
            until(lambda: job.state == "paused")
            held.append(time.monotonic() - begun)
            until(lambda: handles[pause].label == "Resume")
            job.resume()
    told = f"median {1000 * median(known):.0f} ms, worst of {len(known)} {1000 * max(known):.0f} ms"
    return [
        Row("Pause, while an edit of 20,000 runs: until the edit knows", "< 100 ms", told),
        Row("  until it holds, after the step under way", "", f"median {1000 * median(held):.0f} ms"),
    ]


# --------------------------------------------------------------------------------------------------------------- frames
def frames(rounds: int) -> list[Row]:
    """What is sent of a million Gaussians while the camera moves for ten seconds."""
    from splatedit.viewer.app import App
    from splatedit.viewer.stage import opened

    with App(opened(scene(1_000_000))) as app, browser(app.url, "--seconds", "10", "--move") as process:
        came = json.loads(process.communicate()[0])
        seat = app.displays.frames.speed
    rate, pictures = came["bytes"] / came["seconds"], came["frames"] / came["seconds"]
    each = came["bytes"] / max(came["frames"], 1) / 1000
    print("  ", seat)
    return [
        Row("1,000,000 Gaussians in frames, the camera moving 10 s: sent", "<= 2 MB/s", f"{rate / 1e6:.2f} MB/s"),
        Row("  frames", "10 to 15 /s aimed at", f"{pictures:.1f} /s of {each:.0f} kB"),
    ]


# ---------------------------------------------------------------------------------------------------------------- looks
def looks(rounds: int) -> list[Row]:
    """Looks of a million Gaussians, a third of them selected; a rectangle over a quarter of the window."""
    import torch

    from splatedit.cameras import orbit
    from splatedit.viewer.looks import LOOKS
    from splatedit.viewer.pointing import Rectangle, within
    from splatedit.viewer.stage import opened

    before = scene(1_000_000)
    after = before._replace(sh0=before.sh0 + 0.1 * torch.randn_like(before.sh0))
    shown = opened(before, after, up="-y")._replace(pull=torch.rand(before.n), rows=torch.arange(before.n))
    chosen = torch.arange(before.n) % 3 == 0

    def least(draw: Callable[..., Any], *given: Any) -> str:
        took = []
        for _ in range(rounds):
            start, cpu = time.perf_counter(), time.process_time()
            draw(*given)
            took.append((time.perf_counter() - start, time.process_time() - cpu))
        wall, cpu = (1000 * min(times) for times in zip(*took, strict=True))
        return f"{wall:.0f} ms (CPU {cpu:.0f})"

    rows = []
    for look, draw in LOOKS.items():
        plain, marked = (least(draw, shown._replace(look=look, selection=some)) for some in (None, chosen))
        rows.append(Row(f"1,000,000 Gaussians, look {look}", "about 100 ms", f"{plain}, with a selection {marked}"))
    camera, part = orbit(before, 1, size=WINDOW, up="-y"), Rectangle(0.25, 0.25, 0.75, 0.75)
    return [*rows, Row("  what is seen in a rectangle", "", least(within, after, camera, part))]


# ----------------------------------------------------------------------------------------------------------------- main
PARTS: dict[str, Callable[[int], list[Row]]] = {
    "edit": edit,
    "first": first,
    "button": button,
    "frames": frames,
    "looks": looks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--look", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1e6, help=argparse.SUPPRESS)
    parser.add_argument("--move", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.look:
        print(json.dumps(asyncio.run(look(args.look, args.seconds, args.move))))
        return
    load = os.getloadavg()[0]
    rows = []
    for name in args.parts or PARTS:
        print(f"{name} ...", flush=True)
        rows += (found := PARTS[name](args.rounds))
        print(*(f"   {row.what}: {row.measured}" for row in found), sep="\n", flush=True)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {date.today()}")
    print(f"load average at the start {load:.1f}, at the end {os.getloadavg()[0]:.1f}\n")
    width = max(len(row.what) for row in rows)
    for row in rows:
        print(f"{row.what:<{width}}  {row.asked:>20}  {row.measured}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
