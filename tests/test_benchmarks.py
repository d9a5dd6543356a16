"""The renderer's benchmark: what it counts is right, and all it prints can be read."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import raster_limit, raster_peers
from splatedit.errors import InputError
from splatedit.render import rasterization
from splatedit.render.constants import ALPHA_MAX, ALPHA_MIN, T_STOP

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "raster.py"


def run(*words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run([sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(pixels: torch.Tensor) -> int:
    """Number of 4x4 blocks with a pixel in it, of pictures (n, h, w)."""
    n, h, w = pixels.shape
    padded = torch.nn.functional.pad(pixels.float(), (0, -w % 4, 0, -h % 4))
    return int(padded.unfold(1, 4, 4).unfold(2, 4, 4).amax((-1, -2)).sum())


def test_counted_work_is_that_of_the_definition():
    """Every Gaussian on every pixel, in double precision, without rectangles, tiles or early ends."""
    scene = raster_peers.ball(300, 50, 43, degree=1)
    scene["opacities"] = scene["opacities"].sqrt()  # opaque enough that pixels end
    work = raster_limit.work_of(scene)
    _, _, meta = rasterization(**scene)
    seen = (meta["radii"][0] > 0).all(-1)
    order = torch.argsort(meta["depths"][0], stable=True)
    order = order[seen[order]]
    a, b, c = (meta["conics"][0, order, k].double()[:, None, None] for k in range(3))
    mx, my = (meta["means2d"][0, order, k].double()[:, None, None] for k in range(2))
    dx, dy = mx - torch.arange(50) - 0.5, my - torch.arange(43)[:, None] - 0.5
    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    alpha = (meta["opacities"][0, order].double()[:, None, None] * torch.exp(-sigma)).clamp_max(ALPHA_MAX)
    alpha = torch.where((sigma >= 0) & (alpha >= ALPHA_MIN), alpha, 0.0)
    after = (1 - alpha).cumprod(0)
    before = torch.cat([torch.ones(1, 43, 50), after[:-1]])
    colours, ends = (alpha > 0) & (after > T_STOP), (alpha > 0) & (after <= T_STOP) & (before > T_STOP)
    assert ends.any(), "the scene shows what it is for"
    assert (work.gaussians, work.visible, work.pixels, work.sh_bytes) == (300, len(order), 50 * 43, 48)
    assert work.lanes == colours.sum()
    assert work.hit == blocks(colours | ends)
    assert work.hit_backward == blocks(colours)
    assert 0 < work.missed_backward <= work.missed
    assert len(order) <= work.live_pairs <= work.pairs <= len(order) * 4 * 3


def test_work_of_one_gaussian_is_known():
    """A disc of 3.5 square pixels variance in the middle of a tile: its alpha is above 1/255 within 5.83 pixels.

    So its rectangle has 12 by 12 pixels, in 4 by 4 blocks, and the nearest pixel of a corner block is 6.4 pixels away.
    """
    scene = raster_peers.ball(1, 32, 32)
    scene |= {"means": torch.zeros(1, 3), "opacities": torch.tensor([0.5]), "rasterize_mode": "classic"}
    scene["scales"] = torch.full((1, 3), 3 * 3.2**0.5 / float(scene["Ks"][0, 0, 0]))
    scene["Ks"][0, 0, 2] = scene["Ks"][0, 1, 2] = 24.0
    work = raster_limit.work_of(scene)
    x = torch.arange(32) - 23.5
    inside = x**2 + x[:, None] ** 2 <= 2 * 3.5 * math.log(0.5 * 255)
    assert (work.pairs, work.live_pairs, work.lanes) == (1, 1, inside.sum())
    assert (work.hit, work.missed, work.hit_backward, work.missed_backward) == (12, 4, 12, 0)


def test_kernels_find_their_stage():
    from splatedit.render import pool

    names = []
    original, pool.run = pool.run, lambda kernel, *args: (names.append(kernel.__name__), original(kernel, *args))
    try:
        scene = raster_peers.ball(100, 32, 32)
        image, _, _ = rasterization(**scene | {"means": scene["means"].requires_grad_()})
        image.sum().backward()
    finally:
        pool.run = original
    assert {raster_limit.stage_of(name) for name in names} == set(raster_limit.STAGES), names


def test_a_peer_is_loaded_from_its_path_and_leaves_no_trace(tmp_path):
    (tmp_path / "helper.py").write_text("from splatedit.render import rasterization\nmark = 'peer'\n")
    (tmp_path / "other.py").write_text(
        "import helper\ndef rasterization(**scene): return helper.rasterization(**scene, backend='torch')\n"
    )
    path, modules = list(sys.path), dict(sys.modules)
    peer = raster_peers.load(str(tmp_path / "other.py"))
    assert peer.name == f"{tmp_path.name}/other"
    assert sys.path == path and "other" not in sys.modules
    assert all(sys.modules[name] is module for name, module in modules.items())
    image, alphas = peer.draw(raster_peers.ball(30, 20, 20))
    expected = rasterization(**raster_peers.ball(30, 20, 20), backend="torch")
    assert torch.equal(image, expected[0]) and torch.equal(alphas, expected[1])
    with pytest.raises(InputError, match="no such file"):
        raster_peers.load(str(tmp_path / "missing.py"))


def test_gsplat_reference_draws_the_same():
    pytest.importorskip("gsplat")
    scene = raster_peers.ball(200, 40, 36)
    for one, other in zip(raster_peers.gsplat_reference(scene), raster_peers.ours("torch")(scene), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_everything_it_prints_parses(tmp_path):
    file = tmp_path / "result.txt"
    small = ["--rows", "200x32", "--limit-rows", "200x32", "--counts", "100", "200", "300", "--sides", "32", "48", "64"]
    sections = ["--table", "--limit", "--growth", "--threads", "--cameras", "--gpu"]
    printed = run(*sections, *small, "--repeats", "1", "--no-memory", "--num-threads", "2", "--save", str(file))
    assert file.read_text() == printed
    assert [line.split(":")[0][3:] for line in printed.splitlines() if line.startswith("## ")] == [
        s[2:] for s in sections
    ]
    tables, head = {}, ()
    for line in printed.splitlines():
        cells = tuple(cell.strip() for cell in line.split("|"))
        if len(cells) > 1 and not re.search(r"\d", line):
            head = cells
        elif len(cells) > 1:
            tables.setdefault(head, []).append(dict(zip(head, cells, strict=True)))
    assert len(tables) == 6, list(tables)
    for head, rows in tables.items():
        for column in head:
            if column in ("pass", "renderer", "stage", "extra MiB", "cameras"):
                continue
            for row in rows:
                assert float(row[column].rstrip("%k")) >= 0, (column, row)
    compared = [row for head, rows in tables.items() if "renderer" in head for row in rows]
    assert {"splatedit", "torch twin"} <= {row["renderer"] for row in compared}
    assert all(float(row["differs"]) < 1e-2 for row in compared)
    assert all(row["CPU / ours"] == "1.00" for row in compared if row["renderer"] == "splatedit")


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of memory can be reset on Linux only")
def test_memory_is_that_of_the_call():
    extra = json.loads(run("--memory-of", json.dumps(["splatedit", [50_000, 64, 64], ["forward", "forward+backward"]])))
    gradients = 50_000 * 59 * 4 / 2**20
    assert 3 < extra["forward"] < 40, (
        "a record of 64 bytes for each Gaussian at least, and nothing like the scene again"
    )
    assert gradients < extra["forward+backward"] < gradients + 60


def test_single_kernels_are_timed_and_leave_their_arguments_as_they_were():
    """Kernels that use up places and keys would write beyond their arrays the second time."""
    script = SCRIPT.with_name("raster_kernels.py")
    done = subprocess.run([sys.executable, script, "1kx64", "--repeats", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = dict(re.findall(r"^ *([a-z_]+) +([0-9.]+)$", done.stdout, re.M))
    assert {"project", "list_pairs", "composite", "composite_backward", "project_backward"} <= times.keys()
    assert all(0 <= float(t) < 1000 for t in times.values())
