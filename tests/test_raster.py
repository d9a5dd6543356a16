"""The compiled kernels and gsplat against the plain-torch twin, the twin against known answers."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raster_scenes import LEAVES, SCENES, Scene, cameras, cloud, to
from torch import Tensor

from splatedit.render import constants, rasterization, twin

NAMES = [*LEAVES, "means2d"]


def draw(scene: Scene, backend: str, weights: tuple[Tensor, Tensor] | None = None, **options: Any) -> dict[str, Any]:
    """Image, alphas, meta, and the gradients of a weighted sum of image and alphas, if weights are given."""
    scene = {**scene, **{k: scene[k].clone().requires_grad_() for k in LEAVES}}
    image, alphas, meta = rasterization(**scene, backend=backend, **options)
    result = {"image": image.detach(), "alphas": alphas.detach(), "meta": meta}
    if weights is not None:
        meta["means2d"].retain_grad()
        ((image * weights[0].to(image)).sum() + (alphas * weights[1].to(image)).sum()).backward()
        result["grads"] = {k: scene[k].grad for k in LEAVES} | {"means2d": meta["means2d"].grad}
        if options.get("absgrad"):
            result["grads"]["absgrad"] = meta["means2d"].absgrad
    return result


def assert_agree(scene: Scene, other: str, device: str = "cpu", rtol: float = 2e-4, **options: Any) -> None:
    """The other backend in float32 gives the numbers of the twin in float64, values and gradients.

    An alpha of 1/255 contributes or not by its last bit, and T at 1e-4 ends the pixel or not: a pixel in 200 may
    differ, by little, and is left out of the loss whose gradients are then compared, relative to the largest. Depth is
    weighed by alpha in that loss, since dividing by alpha makes much of the last bits where there is hardly anything.
    """
    exact, rough = to(scene, torch.float64), to(scene, device)
    with torch.no_grad():
        a, b = draw(exact, "torch", **options), draw(rough, other, **options)
    error = (a["image"] - b["image"].cpu()).abs().amax(-1) / a["image"].abs().max().clamp_min(1e-3)
    error = error.maximum((a["alphas"] - b["alphas"].cpu()).abs()[..., 0])
    doubtful = error > rtol
    assert doubtful.sum() <= max(2, doubtful.numel() // 200), f"{doubtful.sum()} of {doubtful.numel()} pixels differ"
    assert error.max() < 0.03
    g = torch.Generator().manual_seed(0)
    sure = ~doubtful[..., None]
    weights = (
        torch.randn(a["image"].shape, generator=g, dtype=torch.float64) * sure,
        torch.randn(a["alphas"].shape, generator=g, dtype=torch.float64) * sure,
    )
    if "ED" in options.get("render_mode", "RGB"):
        weights[0][..., -1:] *= a["alphas"]
    a, b = draw(exact, "torch", weights, **options), draw(rough, other, weights, **options)
    for name, grad in a["grads"].items():
        if grad is None:  # viewmats and backgrounds of what does not depend on them
            assert b["grads"][name] is None or not b["grads"][name].any(), name
            continue
        error = (grad - b["grads"][name].cpu()).abs()
        assert error.numel() == 0 or error.max() <= 3 * rtol * grad.abs().max() + 1e-5, f"{name}: {error.max():.2e}"


@pytest.fixture(autouse=True)
def threads():
    """A function that sets the number of threads; 1 until called, since small tensors lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------- the twin knows the answers


def test_one_round_gaussian_is_a_bell_on_screen():
    """Standard deviation s at depth z, seen on the axis: variance (f s / z)^2 + 0.3 pixels^2."""
    n, f, s, z = 32, 40.0, 0.2, 2.5
    K = torch.tensor([[f, 0, n / 2], [0, f, n / 2], [0, 0, 1]]).double()
    point = torch.tensor([[0.0, 0.0, z]]).double()
    quat = torch.tensor([[0.3, -0.5, 0.1, 2.0]]).double()
    color, opacity = torch.tensor([[0.2, 0.5, 0.9]]).double(), torch.tensor([0.8]).double()
    image, alphas, meta = rasterization(
        point, quat, torch.full((1, 3), s).double(), opacity, color, torch.eye(4)[None].double(), K[None], n, n,
        render_mode="RGB+ED",
    )  # fmt: skip
    x = torch.arange(n) + 0.5 - n / 2
    square = x[:, None] ** 2 + x**2
    expected = 0.8 * torch.exp(-0.5 * square / ((f * s / z) ** 2 + 0.3)).double()
    expected = torch.where(expected >= 1 / 255, expected, 0)
    torch.testing.assert_close(alphas[0, ..., 0], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(image[0, ..., :3], expected[..., None] * color, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(image[0, ..., 3], torch.where(expected > 0, z, 0.0).double())
    assert meta["means2d"].tolist() == [[[16.0, 16.0]]]


def test_the_gaussian_that_ends_a_pixel_is_left_out():
    """Two opaque ones leave T = (1 - ALPHA_MAX)^2 or less behind, which is not above T_STOP: only the first counts."""
    z = torch.tensor([2.0, 3.0, 4.0])
    means = torch.stack([0 * z, 0 * z, z], 1)
    quats, scales = torch.tensor([1.0, 0, 0, 0]).expand(3, 4), torch.full((3, 3), 5.0)
    K = torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])[None]
    for backend in ("cpu", "torch"):
        image, alphas, _ = rasterization(
            means, quats, scales, torch.ones(3), torch.eye(3), torch.eye(4)[None], K, 1, 1, backend=backend
        )
        first = constants.ALPHA_MAX
        second = 0.0 if (1 - first) ** 2 <= constants.T_STOP else first * (1 - first)
        torch.testing.assert_close(image.flatten(), torch.tensor([first, second, 0.0]))
        torch.testing.assert_close(alphas.flatten(), torch.tensor([first + second]))


@pytest.mark.parametrize("antialiased", [False, True])
def test_gradients_of_the_projection(antialiased: bool):
    scene = to(cloud(11, 6, width=32, height=32), torch.float64)
    scene["means"] = scene["means"] * torch.tensor([2.0, 2.0, 1.0])  # some far outside, where the Jacobian is clamped
    options = (32, 32, 0.01, 1e10, 0.0, 0.3, antialiased)
    inputs = [scene[k].requires_grad_() for k in ("means", "quats", "scales", "viewmats")]

    def project(means: Tensor, quats: Tensor, scales: Tensor, viewmats: Tensor) -> tuple[Tensor, ...]:
        return twin.project(means, quats, scales, scene["opacities"], viewmats, scene["Ks"], *options)[1:]

    assert torch.autograd.gradcheck(project, inputs)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_gradients_of_the_colors(degree: int):
    scene = to(cloud(12, 5, sh_degree=degree), torch.float64)
    eyes = torch.linalg.inv(scene["viewmats"])[:, :3, 3]
    inputs = [scene["means"].requires_grad_(), eyes.requires_grad_(), scene["colors"].requires_grad_()]
    radii = torch.ones(2, 5, 2, dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda m, e, c: twin.color(degree, m, e, c, radii), inputs)


def test_the_harmonics_are_orthonormal():
    points = torch.randn(400_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = twin.basis(3, torch.nn.functional.normalize(points, dim=-1))
    gram = 4 * torch.pi * b.T @ b / len(b)
    torch.testing.assert_close(gram, torch.eye(16, dtype=torch.float64), atol=0.02, rtol=0)


def test_absgrad_is_the_sum_over_pixels_of_what_each_pulls():
    scene = to(cloud(13, 8, views=1, width=9, height=7), torch.float64)
    weights = torch.randn(7, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros(8, 2, dtype=torch.float64)
    for y in range(7):
        for x in range(9):
            one = torch.zeros(1, 7, 9, 3, dtype=torch.float64)
            one[0, y, x] = weights[y, x]
            expected += draw(scene, "torch", (one, torch.zeros(1, 7, 9, 1)))["grads"]["means2d"][0].abs()
    both = (weights[None], torch.zeros(1, 7, 9, 1))
    torch.testing.assert_close(draw(scene, "torch", both, absgrad=True)["grads"]["absgrad"][0], expected)
    found = draw(to(scene, torch.float32), "cpu", both, absgrad=True)["grads"]["absgrad"][0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * expected.max().item())


# ---------------------------------------------------------------- the kernels agree with the twin


@pytest.mark.parametrize("mode", ["RGB", "RGB+ED"])
@pytest.mark.parametrize("name", SCENES)
def test_kernels_agree_with_the_twin(name: str, mode: str):
    kind = "classic" if mode == "RGB" else "antialiased"
    assert_agree(SCENES[name](), "cpu", render_mode=mode, rasterize_mode=kind)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 150),
    views=st.integers(1, 3),
    width=st.integers(1, 50),
    height=st.integers(1, 50),
    sh_degree=st.integers(0, 3),
    size=st.sampled_from([0.03, 0.1, 0.4]),
    mode=st.sampled_from(["RGB", "D", "ED", "RGB+D", "RGB+ED"]),
    kind=st.sampled_from(["classic", "antialiased"]),
)
def test_kernels_agree_with_the_twin_on_any_cloud(
    seed: int, n: int, views: int, width: int, height: int, sh_degree: int, size: float, mode: str, kind: str
):
    scene = cloud(seed, n, views=views, width=width, height=height, sh_degree=sh_degree, size=size)
    assert_agree(scene, "cpu", render_mode=mode, rasterize_mode=kind, absgrad=True)


@pytest.mark.parametrize("per_view", [False, True])
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_any_number_of_channels(channels: int, per_view: bool):
    scene = cloud(14, 50)
    g = torch.Generator().manual_seed(1)
    scene["colors"] = torch.rand((2, 50, channels) if per_view else (50, channels), generator=g)
    scene |= {"sh_degree": None, "backgrounds": torch.rand(2, channels, generator=g)}
    assert_agree(scene, "cpu", render_mode="RGB+ED")


def test_limits():
    scene = cloud(15, 150)
    options: Any = dict(near_plane=2.7, far_plane=3.4, radius_clip=8.0, eps2d=0.1, rasterize_mode="antialiased")
    assert_agree(scene, "cpu", **options)
    radii, depths = (draw(scene, "cpu", **options)["meta"][k] for k in ("radii", "depths"))
    assert 0 < (radii > 0).all(-1).sum() < radii[..., 0].numel() / 2
    assert depths[(radii > 0).all(-1)].min() >= 2.7 and depths[(radii > 0).all(-1)].max() <= 3.4


def test_meta_and_radii_agree():
    scene = cloud(16, 100)
    a, b = (draw(to(scene, t), k)["meta"] for t, k in ((torch.float64, "torch"), (torch.float32, "cpu")))
    assert a.keys() == b.keys()
    assert a["radii"].dtype == b["radii"].dtype == torch.int32
    assert ((a["radii"] - b["radii"]).abs() <= 1).all()  # a ceil may see the other side of an integer
    for name in ("means2d", "depths", "conics", "opacities"):
        torch.testing.assert_close(b[name].double(), a[name], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- threads, forks, memory


def crowd(views: int = 2) -> tuple[Scene, tuple[Tensor, Tensor]]:
    """Enough Gaussians for several chunks and a rest."""
    scene = cloud(18, 9001, views=views, width=70, height=50, size=0.03)
    g = torch.Generator().manual_seed(0)
    return scene, (torch.randn(views, 50, 70, 4, generator=g), torch.randn(views, 50, 70, 1, generator=g))


def test_same_bits_at_any_number_of_threads(threads: Any):
    scene, weights = crowd()
    runs = []
    for count in (1, 2, 2, 5):
        threads(count)
        runs.append(draw(scene, "cpu", weights, render_mode="RGB+ED", rasterize_mode="antialiased"))
    for run in runs[1:]:
        assert torch.equal(run["image"], runs[0]["image"])
        for name in NAMES:
            assert torch.equal(run["grads"][name], runs[0]["grads"][name]), name


def test_threads_may_render_at_once(threads: Any):
    threads(2)
    scene, weights = crowd(views=1)
    expected = draw(scene, "cpu", weights, render_mode="RGB+ED")
    wrong: list[str] = []

    def work() -> None:
        for _ in range(5):
            found = draw(scene, "cpu", weights, render_mode="RGB+ED")
            wrong.extend(k for k in NAMES if not torch.equal(found["grads"][k], expected["grads"][k]))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong


FORK = """
import os, sys, torch
sys.path.insert(0, "tests")
from raster_scenes import cloud
from splatedit.render import rasterization
torch.set_num_threads(2)
scene = cloud(0, 5000, views=1)
before = rasterization(**scene, backend="cpu")[0]  # starts the pool, whose threads the child will not have
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    one = rasterization(**scene, backend="cpu")[0]
    torch.set_num_threads(2)
    two = rasterization(**scene, backend="cpu")[0]
    os._exit(0 if torch.equal(one, before) and torch.equal(two, before) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(sys.modules["os"], "fork"), reason="no fork here")
def test_a_forked_child_renders():
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60).returncode == 0


def test_a_picture_no_longer_used_is_freed_at_once():
    """No reference cycle between an image and its graph: it would hold hundreds of MB until the collector comes."""
    scene, _ = crowd(views=1)
    gc.collect()
    gc.disable()
    try:
        scene["means"].requires_grad_()
        image, alphas, meta = rasterization(**scene, backend="cpu", render_mode="RGB+ED", absgrad=True)
        assert image.grad_fn is not None
        watched = weakref.ref(image.grad_fn.paired.records)  # pyright: ignore[reportAttributeAccessIssue]
        image.sum().backward()
        del image, alphas, meta
        assert watched() is None
    finally:
        gc.enable()


def test_the_graph_is_kept_on_request():
    scene = cloud(19, 30)
    scene["means"].requires_grad_()
    image, _, _ = rasterization(**scene, backend="cpu", render_mode="RGB+ED")  # four channels
    (once,) = torch.autograd.grad(image.sum(), scene["means"], retain_graph=True)
    (twice,) = torch.autograd.grad(image.sum(), scene["means"])
    assert torch.equal(once, twice)


# ---------------------------------------------------------------- narrower vectors


@pytest.mark.slow
@pytest.mark.parametrize(("cpu", "lanes"), [("nehalem", 4), ("haswell", 8), ("skylake-avx512", 16)])
def test_the_kernels_agree_with_the_twin_at_any_width(cpu: str, lanes: int, tmp_path: Any):
    """This file again, compiled for another processor; skipped where this one cannot run that."""
    if platform.machine() != "x86_64":
        pytest.skip("the names are of x86 processors")
    code = "from splatedit.render.simd import LANES; print(LANES)"

    def run(*words: str, **more: str) -> str:
        command, environment = [sys.executable, *words], {**os.environ, **more}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        return done.stdout

    if int(run("-c", code, NUMBA_CPU_NAME="")) < lanes:
        pytest.skip("this processor has narrower registers")
    other = {"NUMBA_CPU_NAME": cpu, "NUMBA_CACHE_DIR": str(tmp_path)}
    assert int(run("-c", code, **other)) == lanes
    assert " passed" in run("-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", __file__, **other)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["classic", "antialiased"])
@pytest.mark.parametrize("name", [*SCENES, "cloud"])
def test_gsplat_agrees_with_the_twin(name: str, kind: str):
    pytest.importorskip("gsplat")
    if name == "empty":
        pytest.skip("gsplat wants at least one Gaussian")
    scene = cloud(23, 500, width=100, height=80) if name == "cloud" else SCENES[name]()
    # gsplat takes the determinant of a needle as a difference of large numbers, in float32
    rtol = 2e-2 if name == "needles" else 2e-3
    assert_agree(scene, "gsplat", "cuda", rtol, render_mode="RGB+ED", rasterize_mode=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["classic", "antialiased"])
@pytest.mark.parametrize("mode", ["RGB", "D", "ED", "RGB+D", "RGB+ED"])
def test_gsplat_agrees_with_the_twin_in_every_mode(mode: str, kind: str):
    """And in the absolute gradients on screen."""
    pytest.importorskip("gsplat")
    scene = cloud(25, 300, width=90, height=70)
    if mode in ("D", "ED"):
        scene["backgrounds"] = None
    assert_agree(scene, "gsplat", "cuda", 2e-3, render_mode=mode, rasterize_mode=kind, absgrad=True)


@pytest.mark.gpu
def test_cuda_tensors_go_to_gsplat():
    pytest.importorskip("gsplat")
    viewmats, Ks = cameras(1, 64, 64)
    scene = to(cloud(24, 2000, views=1, width=64, height=64), "cuda")
    a, b = rasterization(**scene), rasterization(**scene, backend="gsplat")
    assert torch.equal(a[0], b[0]) and a[2]["means2d"].shape == (1, 2000, 2)
