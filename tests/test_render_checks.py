"""What `rasterization` refuses, what it draws at the edges of float32, which backend it takes, how it starts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raster_scenes import cloud, to
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.render import BACKENDS, autograd, backends, kernel_cache, rasterization, render

NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.usefixtures("one_thread")


def python(code: str, **environment: str) -> str:
    """Run code in a fresh process at the root of the repository; its stderr."""
    command, environment = [sys.executable, "-c", textwrap.dedent(code)], os.environ | environment
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


# ---------------------------------------------------------------- what is refused


def rolled(view: int, **entries: float) -> Tensor:
    """Two view matrices, of which one has other numbers at the places named "row_column"."""
    viewmats = cloud(0, 1)["viewmats"].clone()
    for place, value in entries.items():
        row, column = place[1:].split("_")
        viewmats[view, int(row), int(column)] = value
    return viewmats


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": True}, "packed"),
        ({"sparse_grad": True}, "sparse_grad"),
        ({"tile_size": 8}, "tile_size=8"),
        ({"distributed": True}, "distributed=True"),
        ({"camera_model": "fisheye"}, "camera_model='fisheye'"),
        ({"with_ut": True}, "with_ut=True"),
        ({"covars": torch.zeros(10, 6)}, "covars=a tensor"),
        ({"backend": "cuda"}, "'auto', 'cpu', 'torch', 'gsplat'"),
        ({"backend": "gsplat"}, "CUDA"),
        ({"render_mode": "rgb"}, r"'RGB\+ED'"),
        ({"rasterize_mode": "mip"}, "'antialiased'"),
        ({"sh_degree": 4}, "sh_degree 4"),
        ({"sh_degree": 1.0}, "sh_degree 1.0"),
        # sizes and limits
        ({"width": 0}, "width 0 where a whole number of at least 1"),
        ({"height": -3}, "height -3"),
        ({"width": 40.0}, "width 40.0"),
        ({"height": "34"}, "height '34'"),
        ({"near_plane": 0.0}, "near_plane 0.0"),
        ({"near_plane": NAN}, "near_plane nan"),
        ({"near_plane": 2.0, "far_plane": 2.0}, "far_plane 2.0 where a distance above near_plane=2.0"),
        ({"far_plane": NAN}, "far_plane nan"),
        ({"radius_clip": -1.0}, "radius_clip -1.0"),
        ({"radius_clip": INF}, "radius_clip inf"),
        ({"eps2d": -0.3}, "eps2d -0.3"),
        ({"eps2d": NAN}, "eps2d nan"),
        ({"eps2d": None}, "eps2d None"),
        # shapes and types
        ({"means": torch.zeros(1, 10, 3)}, r"means \(1, 10, 3\).*\(n, 3\)"),
        ({"means": torch.zeros(10, 3, dtype=torch.float16)}, "float16"),
        ({"means": np.zeros((10, 3))}, "means is a ndarray"),
        ({"quats": torch.zeros(10, 3)}, r"quats \(10, 3\).*\(10, 4\)"),
        ({"opacities": torch.zeros(10, 1)}, r"opacities \(10, 1\).*\(10,\)"),
        ({"scales": torch.zeros(10, 3, dtype=torch.float64)}, "scales is torch.float64"),
        ({"Ks": torch.eye(3).repeat(2, 1, 1).to("meta")}, "Ks is torch.float32 on meta, means is torch.float32 on cpu"),
        ({"viewmats": torch.eye(4)}, r"viewmats \(4, 4\)"),
        ({"viewmats": torch.eye(4).tolist()}, "viewmats is a list"),
        ({"viewmats": torch.zeros(0, 4, 4), "Ks": torch.zeros(0, 3, 3), "backgrounds": None}, "one camera"),
        ({"colors": torch.zeros(10, 4, 3)}, r"colors \(10, 4, 3\).*at least 16"),
        ({"colors": torch.zeros(10, 16, 3), "sh_degree": None}, "without sh_degree"),
        ({"colors": torch.zeros(10, 0), "sh_degree": None, "backgrounds": None}, r"colors \(10, 0\)"),
        ({"backgrounds": torch.zeros(3)}, r"backgrounds \(3\).*\(2, 3\)"),
        ({"backgrounds": torch.tensor([[0, 0, 0], [0, NAN, 0]])}, r"backgrounds \(2, 3\): row 1 is \(0, nan, 0\)"),
        # cameras
        ({"viewmats": rolled(1, m0_3=NAN)}, r"viewmats \(2, 4, 4\): row 1 has nan at \[0, 3\]"),
        ({"viewmats": torch.zeros(2, 4, 4)}, r"viewmats \(2, 4, 4\): the last row of camera 0 is \(0, 0, 0, 0\)"),
        ({"viewmats": rolled(0).mT.contiguous()}, "last row of camera 0.*transposed"),
        ({"viewmats": rolled(1, m1_0=0, m1_1=0, m1_2=0)}, r"viewmats \(2, 4, 4\): camera 1 is singular"),
        ({"Ks": torch.eye(3).repeat(2, 1, 1) * torch.tensor([1.0, -1.0, 1.0])}, r"Ks \(2, 3, 3\): camera 0.*\(1, -1\)"),
        ({"Ks": torch.full((2, 3, 3), INF)}, r"Ks \(2, 3, 3\): row 0 has inf"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str, backend: str):
    with pytest.raises(InputError, match=message):
        rasterization(**{"backend": backend, **cloud(21, 10), **changes})


def test_harmonics_per_camera_are_for_the_twin():
    scene = cloud(21, 10)
    scene["colors"] = scene["colors"].expand(2, -1, -1, -1)
    with pytest.raises(InputError, match=r"colors \(2, 10, 16, 3\).*per camera"):
        rasterization(**scene, backend="cpu")
    assert rasterization(**scene, backend="torch")[0].isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("means", (17, 0), NAN, r"means \(30, 3\): row 17 is \(nan, .*\); finite numbers are expected"),
        ("means", (slice(17, 20), 1), -INF, r"means \(30, 3\): row 17 is \(.*, -inf, .*\), the first of 3 such rows"),
        ("scales", (0, 2), INF, r"scales \(30, 3\): row 0 is \(.*, inf\)"),
        ("opacities", (29,), NAN, r"opacities \(30\): row 29 is nan; finite"),
        ("colors", (5, 4, 2), INF, r"colors \(30, 16, 3\): row 5 has inf at \[4, 2\]"),
        ("quats", (3, 1), NAN, r"quats \(30, 4\): row 3 is \(.*, nan, .*\); finite"),
        ("quats", (slice(4, 6),), 0.0, r"quats \(30, 4\): row 4 is \(0, 0, 0, 0\), the first of 2 .* a length from"),
        ("quats", (7,), 1e-25, r"quats \(30, 4\): row 7 is \(1e-25, .*\); a length from 1e-18 to 1e\+18 is expected"),
        ("quats", (7,), 1e25, r"quats \(30, 4\): row 7"),
    ],
)
@pytest.mark.parametrize("seen", [True, False])
def test_what_cannot_be_drawn_is_named(
    name: str, place: tuple[Any, ...], value: float, message: str, seen: bool, backend: str
):
    """Also where nobody would see it: a NaN left to itself spreads through the optimiser."""
    scene = cloud(17, 30)
    if not seen:
        scene["means"] *= 1e3
    scene[name][place] = value
    with pytest.raises(InputError, match=message):
        rasterization(**scene, backend=backend)


def test_colors_per_camera_are_named_by_camera_and_row():
    scene = cloud(17, 30) | {"sh_degree": None, "colors": torch.zeros(2, 30, 3)}
    scene["colors"][1, 8, 2] = NAN
    with pytest.raises(InputError, match=r"colors \(2, 30, 3\): row 1, 8 is \(0, 0, nan\)"):
        rasterization(**scene, backend="torch")


def test_an_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="tile_sise"):
        rasterization(**cloud(22, 3), tile_sise=16)


def test_sizes_from_numpy_are_sizes():
    scene = cloud(22, 3)
    expected = rasterization(**scene)[0]
    assert torch.equal(rasterization(**{**scene, "width": np.int64(40), "eps2d": np.float32(0.3)})[0], expected)


# ---------------------------------------------------------------- the edges of float32


def ball(n: int = 24) -> Gaussians:
    scene = cloud(31, n)
    return Gaussians(
        means=scene["means"],
        quats=scene["quats"],
        scales=scene["scales"].log(),
        opacities=scene["opacities"].logit(),
        sh0=scene["colors"][:, :1],
        shN=scene["colors"][:, 1:],
    )


def two_cameras() -> Cameras:
    scene = cloud(31, 1)
    return Cameras(scene["viewmats"], scene["Ks"], scene["width"], scene["height"])


def picture_and_gradients(gaussians: Gaussians, backend: str, antialiased: bool = True) -> dict[str, Tensor]:
    """All that `render` gives and the gradients of a random weighing of it."""
    leaves = {k: v.clone().requires_grad_() for k, v in gaussians.parameters.items()}
    cameras = two_cameras()
    w2c = cameras.w2c.clone().requires_grad_()
    seen = render(gaussians._replace(**leaves), cameras._replace(w2c=w2c), backend=backend, antialiased=antialiased)
    result = {"rgb": seen.rgb, "alpha": seen.alpha, "depth": seen.depth}
    generator = torch.Generator().manual_seed(0)
    weighed = [(t * torch.randn(t.shape, generator=generator)).sum() for t in result.values()]
    torch.stack(weighed).sum().backward()
    return {k: v.detach() for k, v in result.items()} | {k: v.grad for k, v in (leaves | {"w2c": w2c}).items()}


ENDS: dict[str, Callable[[Gaussians], object]] = {
    **{f"log-scale {s}": lambda g, s=s: g.scales[:6].fill_(s) for s in (-200, -104, -40, 15, 20, 25, 30, 44, 80, 88)},
    "one axis of log-scale 80": lambda g: g.scales[:6, 1].fill_(80),
    "one axis of log-scale 20": lambda g: g.scales[:6, 1].fill_(20),
    "two axes of log-scale 80, one of -200": lambda g: g.scales[:6].copy_(torch.tensor([80.0, -200.0, 80.0])),
    "flat needles": lambda g: g.scales[:6].copy_(torch.tensor([4.8, -50.0, -45.0])),
    "logit 100": lambda g: g.opacities[:6].fill_(100),
    "logit -100": lambda g: g.opacities[:6].fill_(-100),
    "logit 1e30": lambda g: g.opacities[:6].fill_(1e30),
    "means at 1e15": lambda g: g.means[:6].mul_(1e15),
    "means at 1e30": lambda g: g.means[:6].mul_(1e30),
    "means at 1e38": lambda g: g.means[:6].mul_(1e38),
    "means in the camera": lambda g: g.means[:6].copy_(torch.linalg.inv(two_cameras().w2c)[0, :3, 3].expand(6, 3)),
    "all behind": lambda g: g.means.add_(torch.tensor([0.0, 0.0, 100.0])),
    "quats of 1e-15": lambda g: g.quats[:6].mul_(1e-15),
    "quats of 1e15": lambda g: g.quats[:6].mul_(1e15),
    "log-scale 80 at 1e30": lambda g: (g.scales[:6].fill_(80), g.means[:6].mul_(1e30)),
    "colors of 1e15": lambda g: g.shN[:6].mul_(1e15),
}


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("end", ENDS)
def test_no_nan_at_the_edges(end: str, backend: str, antialiased: bool):
    gaussians = ball()
    ENDS[end](gaussians)
    for name, found in picture_and_gradients(gaussians, backend, antialiased).items():
        assert found.isfinite().all(), f"{name}: {int((~found.isfinite()).sum())} of {found.numel()}"


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@settings(max_examples=15, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    log_scale=st.sampled_from([(-90, 88), (-10, 30), (-20, 5)]),
    distance=st.sampled_from([(0, 0), (-20, 85)]),
    length=st.sampled_from([(0, 0), (-35, 35)]),
    antialiased=st.booleans(),
)
def test_no_nan_at_any_magnitude(
    seed: int, log_scale: tuple[int, int], distance: tuple[int, int], length: tuple[int, int], antialiased: bool,
    backend: str,
):  # fmt: skip
    """All three as natural logarithms, drawn evenly between two bounds."""
    gaussians, generator = ball(), torch.Generator().manual_seed(seed)

    def between(bounds: tuple[int, int], *shape: int) -> Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator)

    gaussians.scales.copy_(between(log_scale, 24, 3))
    gaussians.means.mul_(between(distance, 24, 1).exp())
    gaussians.quats.mul_(between(length, 24, 1).exp())
    for name, found in picture_and_gradients(gaussians, backend, antialiased).items():
        assert found.isfinite().all(), name


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    "end", ["log-scale 80", "log-scale 88", "one axis of log-scale 80", "logit -100", "means at 1e30"]
)
def test_what_cannot_be_seen_changes_nothing(end: str, backend: str):
    """A Gaussian larger than float32 can square is not drawn, as with gsplat; the others' gradients notice nothing."""
    gaussians = ball()
    ENDS[end](gaussians)
    expected = picture_and_gradients(gaussians.select(slice(6, None)), backend)
    found = picture_and_gradients(gaussians, backend)
    for name in expected:
        rows = slice(6, None) if name in gaussians.parameters else slice(None)
        torch.testing.assert_close(found[name][rows], expected[name], rtol=1e-5, atol=1e-6)
        if name in gaussians.parameters:
            assert not found[name][:6].any(), name


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("length", [1e-15, 1e-3, 1e3, 1e15])
def test_the_length_of_a_quaternion_does_not_matter(length: float, backend: str):
    gaussians = ball()
    long = gaussians._replace(quats=gaussians.quats * length)
    expected, found = picture_and_gradients(gaussians, backend), picture_and_gradients(long, backend)
    found["quats"] = found["quats"] * length
    for name in expected:
        atol = 1e-4 * float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=atol)


# ---------------------------------------------------------------- which backend


def test_without_numba_the_twin_steps_in_with_one_warning():
    python("""
        import sys, warnings
        sys.modules["numba"] = None
        sys.path.insert(0, "tests")
        import torch
        from raster_scenes import cloud
        from splatedit.render import rasterization, warm
        scene = cloud(0, 20)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            images = [rasterization(**scene)[0] for _ in range(2)]
            warm()
        messages = [str(w.message) for w in caught]
        assert len(messages) == 1 and "numba" in messages[0] and "slow" in messages[0], messages
        assert caught[0].category is RuntimeWarning
        assert torch.equal(images[0], rasterization(**scene, backend="torch")[0])
    """)


@pytest.fixture
def kernels_that(monkeypatch: pytest.MonkeyPatch):
    """A function that has the kernels' first runs end as listed; whether kernels run here is asked anew."""

    def setup(*results: Exception | None) -> None:
        ends = iter(results)

        def probe() -> None:
            if (end := next(ends)) is not None:
                raise end

        monkeypatch.setattr(autograd, "probe", probe)
        monkeypatch.setattr(kernel_cache, "clear", lambda: None)

    caches = (backends._compiled, backends._can_compile)
    for function in caches:
        function.cache_clear()
    yield setup
    for function in caches:
        function.cache_clear()


def test_where_numba_cannot_compile_the_twin_steps_in(kernels_that: Callable[..., None]):
    kernels_that(*[OSError("LLVM knows no such processor")] * 4)
    scene = cloud(0, 20)
    with pytest.warns(RuntimeWarning, match="plain torch, which is slow.*LLVM knows no such processor"):
        image = rasterization(**scene)[0]
    assert torch.equal(image, rasterization(**scene, backend="torch")[0])
    with pytest.raises(InputError, match='backend "cpu" needs numba.*LLVM knows no such processor'):
        rasterization(**scene, backend="cpu")


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_machine_code_that_cannot_be_read_is_made_again(kernels_that: Callable[..., None], backend: str):
    """A renamed package, a file cut short: not a reason to draw slowly ever after."""
    scene = cloud(0, 20)
    expected = rasterization(**scene, backend="cpu")[0]
    kernels_that(ModuleNotFoundError("No module named 'splatedit.raster'"), None)
    backends._compiled.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(rasterization(**scene, backend=backend)[0], expected)


def test_float64_goes_to_the_twin():
    scene = to(cloud(20, 10), torch.float64)
    assert torch.equal(rasterization(**scene)[0], rasterization(**scene, backend="torch")[0])


def test_backends_are_what_the_documentation_says():
    assert list(BACKENDS) == ["auto", "cpu", "torch", "gsplat"]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch):
    """Tensors say that they are on a GPU."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Tensor, "is_cpu", False)


def test_gsplat_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, on_cuda: None):
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(InputError, match=r"pip install splatedit\[cuda\]"):
        rasterization(**cloud(20, 10))


def test_gsplat_gets_all_arguments(monkeypatch: pytest.MonkeyPatch, on_cuda: None):
    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(rasterization=lambda **arguments: arguments))
    scene = cloud(20, 10)
    found: Any = rasterization(**scene, eps2d=0.1, camera_model="fisheye")
    assert found["means"] is scene["means"]
    assert (found["eps2d"], found["camera_model"], found["packed"], found["far_plane"]) == (0.1, "fisheye", False, 1e10)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("colors", (3, 2, 1), INF, r"colors \(10, 16, 3\): row 3 has inf at \[2, 1\]"),
        ("quats", (9,), 0.0, r"quats \(10, 4\): row 9 is \(0, 0, 0, 0\)"),
        ("viewmats", (1, 2), 0.0, "camera 1 is singular"),
    ],
)
def test_what_gsplat_gets_is_checked(
    name: str, place: Any, value: float, message: str, monkeypatch: pytest.MonkeyPatch, on_cuda: None
):
    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(rasterization=lambda **arguments: arguments))
    scene = cloud(20, 10)
    scene[name][place] = value
    with pytest.raises(InputError, match=message):
        rasterization(**scene)


# ---------------------------------------------------------------- the start


EVERYTHING = """
    import sys
    import torch
    import splatedit.render
    heavy = {"numba", "llvmlite", "gsplat", "diffusers", "transformers", "omegaconf", "huggingface_hub"}
    assert not heavy & set(sys.modules), heavy & set(sys.modules)

    sys.path.insert(0, "tests")
    from raster_scenes import LEAVES, cloud
    from splatedit.render import rasterization, warm
    warm()
    modules = [m for name, m in sys.modules.items() if name.startswith("splatedit.render.")]
    kernels = {k: v for m in modules for k, v in vars(m).items() if hasattr(v, "signatures")}
    before = {k: list(v.signatures) for k, v in kernels.items()}
    assert len(before) > 5

    def draw(scene, **options):
        scene = scene | {k: scene[k].clone().requires_grad_() for k in LEAVES if scene[k] is not None}
        image, alphas, meta = rasterization(**scene, backend="cpu", **options)
        (image.sum() + alphas.sum()).backward()

    for mode in ("RGB", "D", "ED", "RGB+D", "RGB+ED"):
        for kind in ("classic", "antialiased"):
            draw(cloud(0, 5000, views=2), render_mode=mode, rasterize_mode=kind, radius_clip=1, far_plane=1e10)
    for degree in range(4):
        draw(cloud(0, 20, sh_degree=degree) | {"backgrounds": None}, absgrad=True, near_plane=1, eps2d=0)
    for shape in ((20, 1), (2, 20, 3), (20, 9)):
        draw(cloud(0, 20) | {"colors": torch.rand(20, 1).expand(shape), "sh_degree": None, "backgrounds": None})
    draw(cloud(0, 0))
    draw(cloud(0, 1, width=1, height=1), render_mode="ED")
    after = {k: list(v.signatures) for k, v in kernels.items()}
    assert after == before, [k for k in after if after[k] != before[k]]
    assert not {"diffusers", "transformers", "omegaconf"} & set(sys.modules)
"""


def test_nothing_compiles_after_warm_and_nothing_heavy_is_imported():
    python(EVERYTHING)


TINY = """
    from splatedit.render.kernel_cache import jit
    from {package} import numbers

    @jit(nogil=True)
    def twice(x):
        return numbers.FACTOR * x
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[float, int]]:
    """A package, imported anew, whose kernel takes a constant from its neighbour: result and hits of the cache."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(factor: int, package: str = "small") -> tuple[float, int]:
        folder = tmp_path / package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        (folder / "numbers.py").write_text(f"FACTOR = {factor}")
        if not (folder / "kernels.py").exists():  # numba 0.61 looks at its time stamp too
            (folder / "kernels.py").write_text(textwrap.dedent(TINY.format(package=package)))
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        importlib.invalidate_caches()
        kernel_cache.digest.cache_clear()
        twice = importlib.import_module(f"{package}.kernels").twice
        return twice(10.0), sum(twice.stats.cache_hits.values())

    return run


def test_machine_code_is_kept_on_disk_and_follows_every_change(tiny: Callable[..., tuple[float, int]], tmp_path: Path):
    """numba alone watches the file that holds the function, and would go on with the old factor."""
    assert tiny(2) == (20.0, 0)
    assert tiny(2) == (20.0, 1)
    assert tiny(3) == (30.0, 0)
    assert tiny(3) == (30.0, 1)
    assert len(list((tmp_path / "cache").rglob("*.nbc"))) == 1, "what no source stands for any more is removed"
    kernel_cache.clear()
    assert tiny(3) == (30.0, 0)


def test_machine_code_of_a_package_renamed_is_not_read(tiny: Callable[..., tuple[float, int]], tmp_path: Path):
    """It holds the old name of the package, under which numba would look for classes in vain."""
    assert tiny(2, "small") == tiny(2, "renamed") == (20.0, 0)
    one, other = ({path.name for path in folder.iterdir()} for folder in (tmp_path / "cache").iterdir())
    assert len(one) == len(other) == 2 and not one & other


def test_a_kernel_is_made_from_its_file_and_all_it_imports():
    folder = Path(backends.__file__).parent
    found = {path.name for path in kernel_cache.sources(folder / "compositing.py")}
    assert {"compositing.py", "algebra.py", "simd.py", "constants.py"} <= found
    assert not {"backends.py", "checks.py", "twin.py", "pictures.py"} & found, "an edit there would compile all anew"


def test_where_nothing_can_be_written_kernels_compile_all_the_same():
    namespace: dict[str, Any] = {"jit": kernel_cache.jit, "__name__": "nowhere"}
    exec(compile("@jit()\ndef thrice(x):\n    return 3 * x\n", "nowhere.py", "exec"), namespace)
    assert namespace["thrice"](2) == 6


def test_compiling_for_long_is_said_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(kernel_cache, "PATIENCE", 0.05)
    progress = kernel_cache._Progress()
    ours = SimpleNamespace(data={"dispatcher": kernel_cache.jit()(lambda x: x)})
    ours.data["dispatcher"].py_func.__module__ = "splatedit.render.compositing"
    quick = SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=SimpleNamespace(__module__="numpy"))})
    for event, seconds in ((quick, 0.2), (ours, 0.0)):
        progress.on_start(event)
        time.sleep(seconds)
        progress.on_end(event)
    assert not capfd.readouterr().err
    for _ in range(3):
        progress.on_start(ours)
        progress.on_start(ours)
        progress.on_end(ours)
        time.sleep(0.2)
        progress.on_end(ours)
    assert capfd.readouterr().err.count("splatedit: compiling the CPU renderer, once") == 1
