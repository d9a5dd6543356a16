"""Lifting maps to Gaussians and picking Gaussians by pixel, against a dense compositing in numpy."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from raster_scenes import SCENES, Scene, cloud, to
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.render import (
    backends,
    backprojection,
    contributions,
    fill_unseen,
    lift,
    lifting,
    pick,
    rasterization,
    render,
    twin,
    visibility,
)
from splatedit.render.constants import ALPHA_MAX, ALPHA_MIN, T_STOP

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
GEOMETRY = ("means", "quats", "scales", "opacities", "viewmats", "Ks")
SIZE = ("width", "height")


def geometry(scene: Scene, *names: str) -> Scene:
    return {k: scene[k] for k in (*GEOMETRY, *names)}


def dense(scene: Scene, kind: str = "classic") -> np.ndarray:
    """Blending weights (c, n, h, w) in float64: every Gaussian at every pixel, no tiles, one after the other."""
    exact = to(geometry(scene, *SIZE), torch.float64)
    colors = torch.zeros(len(scene["means"]), 1, dtype=torch.float64)
    _, _, meta = rasterization(**exact, colors=colors, rasterize_mode=kind, backend="torch")
    means2d, conics, opacities, depths = (
        meta[k].numpy() for k in ("means2d", "conics", "opacities", "depths")
    )  # their values have tests of their own
    x, y = np.meshgrid(np.arange(scene["width"]) + 0.5, np.arange(scene["height"]) + 0.5)
    weights = np.zeros((*depths.shape, *x.shape))
    for c, order in enumerate(np.argsort(depths.astype(np.float32), axis=1, kind="stable")):
        left, live = np.ones_like(x), np.ones_like(x, bool)
        for i in order[(meta["radii"][c, order] > 0).all(-1).numpy()]:
            dx, dy = means2d[c, i, 0] - x, means2d[c, i, 1] - y
            xx, xy, yy = conics[c, i]
            alpha = np.minimum(opacities[c, i] * np.exp(-0.5 * (xx * dx**2 + yy * dy**2) - xy * dx * dy), ALPHA_MAX)
            alpha[alpha < ALPHA_MIN] = 0
            live &= left * (1 - alpha) > T_STOP
            weights[c, i] = np.where(live, alpha * left, 0)
            left = np.where(live, left * (1 - alpha), left)
    return weights


def random_maps(scene: Scene, k: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(scene["viewmats"]), k, scene["height"], scene["width"], generator=g)


@pytest.fixture(params=["float64", "float32"])
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The twin in float64, exact; and what float32 CPU tensors get, the compiled kernels where numba works."""
    return {"dtype": getattr(torch, request.param), "rtol": 1e-9 if request.param == "float64" else 2e-4}


def assert_near(found: Tensor, expected: np.ndarray | Tensor, rtol: float) -> None:
    """The error is small beside the largest value."""
    expected = torch.as_tensor(expected).double()
    assert found.shape == expected.shape
    if found.numel():
        error = (found.double() - expected).abs().max()
        assert error <= rtol * expected.abs().max().clamp_min(1e-3), f"{error:.2e}"


# ---------------------------------------------------------------- lifting


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_lifting_is_the_sum_of_dense_compositing(mode: str, kind: dict[str, Any]):
    scene = cloud(0, 50, views=3)
    weights, maps = dense(scene, mode), random_maps(scene, 2)
    total, weight = backprojection(**to(geometry(scene), kind["dtype"]), maps=maps, rasterize_mode=mode)
    assert total.dtype == weight.dtype == kind["dtype"]
    assert_near(total, np.einsum("cnhw,ckhw->nk", weights, maps.double().numpy()), kind["rtol"])
    assert_near(weight, weights.sum((0, 2, 3)), kind["rtol"])


@pytest.mark.parametrize("name", SCENES)
def test_lifting_of_odd_scenes(name: str):
    scene = SCENES[name]()
    maps = random_maps(scene, 1)
    expected = np.einsum("cnhw,ckhw->nk", dense(scene), maps.double().numpy())
    total, _ = backprojection(**to(geometry(scene), torch.float64), maps=maps)
    assert_near(total, expected, 1e-9)


def test_lifting_is_the_transpose_of_drawing(kind: dict[str, Any]):
    scene = to(cloud(1, 80), kind["dtype"])
    maps = random_maps(scene, 5).to(kind["dtype"])
    colors = torch.randn(80, 5, generator=torch.Generator().manual_seed(1)).to(kind["dtype"])
    image, alphas, _ = rasterization(**geometry(scene, *SIZE), colors=colors)
    total, weight = backprojection(**geometry(scene), maps=maps)
    torch.testing.assert_close((total * colors).sum(), (image * maps.permute(0, 2, 3, 1)).sum(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weight.sum(), alphas.sum(), rtol=1e-5, atol=0)


def test_lifting_is_linear():
    scene = to(cloud(2, 60), torch.float64)
    a, b = random_maps(scene, 2, 0).double(), random_maps(scene, 2, 1).double()
    sums = [backprojection(**geometry(scene), maps=m)[0] for m in (a, b, 2 * a - 3 * b)]
    torch.testing.assert_close(sums[2], 2 * sums[0] - 3 * sums[1])


def test_many_channels_are_as_good_as_one(kind: dict[str, Any]):
    """More than are drawn at once, the column of weights alone in the last group or not."""
    scene = to(cloud(3, 40, views=1, width=20, height=17), kind["dtype"])
    for k in (lifting.CHANNELS - 1, lifting.CHANNELS, lifting.CHANNELS + 3):
        maps = random_maps(scene, k)
        total, weight = backprojection(**geometry(scene), maps=maps)
        for i in (0, k - 1):
            one, same = backprojection(**geometry(scene), maps=maps[:, i : i + 1])
            assert_near(total[:, i : i + 1], one, 1e-5)
            torch.testing.assert_close(weight, same, rtol=1e-5, atol=1e-6)
    none, weight = backprojection(**geometry(scene), maps=maps[:, :0])
    assert none.shape == (40, 0)
    torch.testing.assert_close(weight, same, rtol=1e-5, atol=1e-6)


def test_cameras_are_drawn_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    scene = to(cloud(4, 40, views=5), torch.float64)
    maps = random_maps(scene, 2)
    expected = backprojection(**geometry(scene), maps=maps)
    rough = to(geometry(scene, *SIZE), torch.float32)
    whole = contributions(**rough)
    drawn = []

    def counted(**arguments: Any) -> Any:
        drawn.append(len(arguments["viewmats"]))
        return rasterization(**arguments)

    monkeypatch.setattr(lifting, "rasterization", counted)
    for memory, batches in ((2**40, [5]), (1, [1] * 5), (8 * 2 * (3 * 40 * 34 * 3 + 48 * 40), [2, 2, 1])):
        drawn.clear()
        monkeypatch.setattr(lifting, "MEMORY", memory)
        found = backprojection(**geometry(scene), maps=maps)
        assert drawn == batches
        torch.testing.assert_close(found, expected)
        picked = contributions(**rough)
        assert all(torch.equal(a, b) for a, b in zip(picked, whole, strict=True))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_graph_is_left_and_none_is_needed(guard: Any):
    with guard():
        scene = cloud(5, 30)
        leaves = {k: v.clone().requires_grad_() for k, v in geometry(scene).items()}
        total, weight = backprojection(**leaves, maps=random_maps(scene, 1))
        ids, best, pixels = contributions(**leaves, width=40, height=34)
    assert total.any() and pixels.any()
    assert not any(t.requires_grad for t in (total, weight, best))
    assert all(v.grad is None for v in leaves.values())


# ---------------------------------------------------------------- picking


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("mode", ["classic", "antialiased"])
@pytest.mark.parametrize("name", [*SCENES, "cloud"])
def test_picking_against_dense_compositing(name: str, mode: str, backend: str):
    """float64 on the twin gives the very numbers; in float32 an alpha of 1/255 contributes or not by its last bit."""
    scene = cloud(6, 200) if name == "cloud" else SCENES[name]()
    weights = dense(scene, mode)
    exact = to(geometry(scene, *SIZE), torch.float64) if backend == "torch" else geometry(scene, *SIZE)
    ids, best, pixels = contributions(**exact, rasterize_mode=mode, backend=backend)
    c, n, h, w = weights.shape
    assert ids.shape == best.shape == (c, h, w) and pixels.shape == (c, n)
    assert ids.dtype == pixels.dtype == torch.int64 and best.dtype == exact["means"].dtype
    counts = (weights > 0).sum((2, 3))
    if n == 0:
        assert (ids == -1).all() and not best.any()
        return
    largest = weights.max(1)
    # where two are almost equal, as copies at one place may be, either may win
    chosen = np.take_along_axis(weights, ids.clamp_min(0).numpy()[:, None], 1)[:, 0]
    if backend == "torch":
        np.testing.assert_allclose(best.numpy(), largest, atol=1e-12)
        np.testing.assert_allclose(chosen, largest, atol=1e-12)
        np.testing.assert_array_equal(ids.numpy() < 0, largest == 0)
        np.testing.assert_array_equal(pixels.numpy(), counts)
    else:
        wrong = (np.abs(chosen - largest) > 1e-4) | (np.abs(best.numpy() - largest) > 1e-4)
        wrong |= (ids.numpy() < 0) != (largest == 0)
        assert wrong.sum() <= max(2, wrong.size // 200)
        assert np.abs(pixels.numpy() - counts).sum() <= max(4, counts.sum() // 200)


def test_the_kernels_pick_the_same_at_any_number_of_threads():
    """Several chunks of Gaussians, several groups of pairs in a tile."""
    scene = geometry(cloud(10, 9001, width=70, height=50, size=0.05), *SIZE)
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        runs.append(contributions(**scene))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    ids, best, pixels = contributions(**scene, backend="torch")
    assert (ids != runs[0][0]).sum() <= ids.numel() // 100, "but for almost equal ones"
    torch.testing.assert_close(best.quantile(0.99), runs[0][1].quantile(0.99), rtol=1e-4, atol=0)
    assert ((best - runs[0][1]).abs() > 1e-4).sum() <= ids.numel() // 200
    assert (pixels - runs[0][2]).abs().sum() <= pixels.sum() // 500


def discs(overlap: float) -> dict[str, Any]:
    """Two flat opaque discs, number 1 in front of number 0, seen on the axis; the front one is shifted to the right."""
    return {
        "means": torch.tensor([[0.0, 0.0, 4.0], [overlap, 0.0, 2.0]]),
        "quats": torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(2, 4),
        "scales": torch.tensor([[0.4, 0.4, 0.01], [0.2, 0.2, 0.01]]),
        "opacities": torch.tensor([0.99, 0.99]),
        "viewmats": torch.eye(4)[None],
        "Ks": torch.tensor([[[40.0, 0, 32], [0, 40, 32], [0, 0, 1]]]),
        "width": 64,
        "height": 64,
    }


def test_the_front_disc_is_picked():
    ids, weight, pixels = contributions(**discs(0.0))
    assert ids[0, 32, 32] == 1 and ids[0, 0, 0] == -1 and 0 not in ids, "the far one is hidden exactly"
    assert weight[0, 32, 32] > 0.95 and weight[0, 0, 0] == 0
    assert pixels[0, 1] == (ids == 1).sum(), "all it touches"
    ids, _, pixels = contributions(**discs(0.5))
    assert ids[0, 32, 32] == 0 and ids[0, 32, 42] == 1, "0.5 at depth 2 is 10 pixels to the right"
    assert (pixels[0] >= torch.bincount(ids[ids >= 0], minlength=2)).all()


def test_a_little_less_behind_loses():
    """Alpha 1/3 behind 1/4 would tie, at 3/4 1/3 = 1/4; the order in memory has no say."""
    pair = discs(0.0) | {"opacities": torch.tensor([1 / 3, 1 / 4])}
    pair["scales"] = torch.tensor([[2e4], [1e4]]).expand(2, 3)  # flat over the whole picture
    pair = {k: v.double() if isinstance(v, Tensor) else v for k, v in pair.items()}
    for change in (-1e-4, 1e-4):
        pair["opacities"][0] = 1 / 3 + change
        ids, weight, pixels = contributions(**pair)
        swapped = {**pair, **{k: pair[k].flip(0) for k in ("means", "quats", "scales", "opacities")}}
        assert (ids == int(change < 0)).all() and torch.equal(contributions(**swapped)[0], 1 - ids)
        torch.testing.assert_close(weight, torch.full_like(weight, 0.25), rtol=0, atol=2e-4)
        assert (pixels == 64 * 64).all()


# ---------------------------------------------------------------- of a scene


def rig(n: int = 3, width: int = 40, height: int = 32) -> Cameras:
    scene = cloud(0, 1, views=n, width=width, height=height)
    w2c = scene["viewmats"].clone()
    w2c[:, :3, 3] = w2c[:, :3, 3] - w2c[:, :3, :3] @ torch.tensor([0.5, 0.0, 0.0])  # the ball of conftest
    return Cameras(w2c, scene["Ks"], width, height)


def test_a_constant_map_has_a_constant_mean(cloud: Gaussians):
    far_off = torch.arange(300) < 20
    cloud = cloud._replace(means=torch.where(far_off[:, None], 100.0, cloud.means))
    lifted = lift(cloud, rig(), torch.full((3, 1, 32, 40), 0.75))
    assert torch.equal(lifted.seen, ~far_off)
    mean = lifted.mean(unseen=-1.0)
    torch.testing.assert_close(mean[lifted.seen], torch.full_like(mean[lifted.seen], 0.75), rtol=1e-5, atol=0)
    assert (mean[~lifted.seen] == -1).all() and torch.isfinite(lifted.mean()).all()


def test_the_weights_add_up_to_alpha(cloud: Gaussians):
    cameras = rig()
    for antialiased in (True, False):
        lifted = lift(cloud, cameras, torch.ones(3, 1, 32, 40), antialiased=antialiased)
        alpha = render(cloud, cameras, antialiased=antialiased).alpha
        torch.testing.assert_close(lifted.weight.sum(), alpha.sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(lifted.total[:, 0], lifted.weight)


def test_a_mask_finds_its_gaussians(cloud: Gaussians):
    """The mask is where the picture is blue; blue are those above, at negative y."""
    cameras = rig()
    rgb = render(cloud, cameras).rgb
    lifted = lift(cloud, cameras, rgb[:, 2:] > rgb[:, :1])
    sure = (lifted.weight > 2) & (cloud.means[:, 1].abs() > 0.3)  # more than shines through a gap
    assert sure.sum() > 100
    assert torch.equal(lifted.mean()[sure, 0] > 0.5, cloud.means[sure, 1] < 0)


def test_results_of_several_calls_add_up(cloud: Gaussians):
    cameras, maps = rig(), torch.rand(3, 2, 32, 40, generator=torch.Generator().manual_seed(0))
    whole = lift(cloud, cameras, maps)
    a, b = lift(cloud, cameras.pick(slice(0, 2)), maps[:2]), lift(cloud, cameras.pick(2), maps[2:])
    torch.testing.assert_close(lifting.Lifted(a.total + b.total, a.weight + b.weight), whole)


def test_what_is_seen_is_what_contributes(cloud: Gaussians):
    cameras = rig()
    pixels = visibility(cloud, cameras)
    lifted = lift(cloud, cameras, torch.ones(3, 1, 32, 40))
    assert pixels.shape == (3, 300)
    different = (pixels.sum(0) > 0) != lifted.seen
    assert different.sum() <= 2, "an alpha of 1/255 may count in one and not in the other"
    picked = pick(cloud, cameras)
    alpha = render(cloud, cameras).alpha[:, 0]
    assert torch.equal(picked.ids >= 0, picked.weight > 0)
    assert ((picked.ids >= 0) != (alpha > 0)).sum() <= 2 and (picked.weight <= alpha + 1e-5).all()
    shown = picked.ids[picked.ids >= 0].unique()
    assert (pixels.sum(0)[shown] > 0).all()


def test_nothing_to_see(cloud: Gaussians):
    cameras = rig()
    away = cameras._replace(w2c=torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])) @ cameras.w2c)
    with pytest.raises(InputError, match="'torch'"):
        lift(cloud.select([]), cameras, torch.ones(3, 2, 32, 40), backend="none")
    for gaussians, rig_ in ((cloud, away), (cloud.select([]), cameras)):
        lifted = lift(gaussians, rig_, torch.ones(3, 2, 32, 40))
        assert lifted.mean(unseen=0.5).eq(0.5).all() and lifted.mean().shape == (gaussians.n, 2)
        assert not lifted.seen.any()
        picked = pick(gaussians, rig_)
        assert picked.ids.shape == (3, 32, 40) and (picked.ids == -1).all() and not picked.weight.any()
        assert visibility(gaussians, rig_).sum() == 0


def test_the_example_of_the_documentation(monkeypatch: pytest.MonkeyPatch):
    text = (ROOT / "docs" / "renderer.md").read_text().partition("## Lifting and picking")[2]
    code = re.search(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert code is not None
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(code[1], names)
    share, height = names["upper"][:, 0], -names["gaussians"].means[:, 1]  # up is -y
    assert 0 < names["head"].n < names["gaussians"].n
    assert height[share > 0.5].mean() > height.mean() > height[share < 0.5].mean()
    assert (names["picked"].ids[:, 48, 48] >= 0).all()
    assert (names["hidden"] == names["lifted"].seen).sum() <= 5, "but for an alpha of 1/255"


# ---------------------------------------------------------------- the unseen


def test_the_unseen_get_the_mean_of_the_nearest_seen():
    means = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [10, 0, 0], [1.9, 0, 0]])
    values = torch.tensor([[1.0, 5], [7, 7], [3, 9], [100, 100], [9, 9]])
    seen = torch.tensor([True, False, True, True, False])
    filled = fill_unseen(values, seen, means, neighbours=2)
    assert filled.tolist() == [[1, 5], [2, 7], [3, 9], [100, 100], [2, 7]]
    assert fill_unseen(values, seen, means, neighbours=1)[4].tolist() == [3, 9]
    assert fill_unseen(values, seen, means)[1].tolist() == pytest.approx([104 / 3, 114 / 3]), "all three there are"
    assert values[1].tolist() == [7, 7], "a copy"
    for every in (torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)):
        assert torch.equal(fill_unseen(values, every, means), values)
    assert fill_unseen(values[:, 0], seen, means, 2).tolist() == [1, 2, 3, 100, 2]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.zeros(3, 1, 40, 32), r"maps: found \(3, 1, 40, 32\), expected \(3, k, 32, 40\).*Cameras\.resized"),
        (torch.zeros(2, 1, 32, 40), r"maps: found \(2, 1, 32, 40\)"),
        (torch.zeros(3, 32, 40), r"maps: found \(3, 32, 40\)"),
        (torch.full((3, 1, 32, 40), float("nan")), "maps: found NaN"),
        (torch.zeros(3, 1, 32, 40, dtype=torch.complex64), "complex64"),
        (np.zeros((3, 1, 32, 40)), "maps: found a ndarray"),
    ],
)
def test_mistakes_in_maps_are_named(cloud: Gaussians, maps: Any, message: str):
    with pytest.raises(InputError, match=message):
        lift(cloud, rig(), maps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": torch.zeros(10, 2)}, r"means \(10, 2\)"),
        ({"opacities": torch.zeros(10, 1)}, r"opacities \(10, 1\)"),
        ({"quats": torch.zeros(9, 4)}, r"quats \(9, 4\)"),
        ({"viewmats": torch.zeros(0, 4, 4), "Ks": torch.zeros(0, 3, 3)}, "one camera"),
        ({"rasterize_mode": "mip"}, "'antialiased'"),
        ({"backend": "cuda"}, "'auto', 'cpu', 'torch', 'gsplat'"),
        ({"backend": "gsplat"}, "CUDA"),
        ({k: v.double() for k, v in geometry(cloud(7, 10)).items()} | {"backend": "cpu"}, "float64"),
    ],
)
def test_mistakes_in_arguments_are_named(changes: dict[str, Any], message: str):
    scene = geometry(cloud(7, 10)) | changes
    with pytest.raises(InputError, match=message):
        backprojection(**scene, maps=torch.zeros(len(scene["viewmats"]), 1, 8, 8))
    with pytest.raises(InputError, match=message):
        contributions(**scene, width=8, height=8)


def test_mistakes_in_filling_are_named():
    seen = torch.ones(5, dtype=torch.bool)
    for values, bad, message in (
        (torch.zeros(4, 1), seen, r"values \(4, 1\)"),
        (torch.zeros(5, 1), seen[:4], r"seen \(4\)"),
        (torch.zeros(5, 1), seen.float(), "float32"),
    ):
        with pytest.raises(InputError, match=message):
            fill_unseen(values, bad, torch.zeros(5, 3))
    with pytest.raises(InputError, match="neighbours 0"):
        fill_unseen(torch.zeros(5, 1), seen, torch.zeros(5, 3), neighbours=0)


# ---------------------------------------------------------------- gsplat


def listing(calls: list[dict[str, Any]]) -> Any:
    """gsplat.rasterize_to_indices_in_range in its documented shapes, slow, by the rules of its kernel."""

    def rasterize_to_indices_in_range(
        range_start, range_end, transmittances, means2d, conics, opacities, image_width, image_height, tile_size,
        isect_offsets, flatten_ids,
    ):  # fmt: skip
        n = means2d.shape[-2]
        assert means2d.shape == (1, n, 2) and conics.shape == (1, n, 3) and opacities.shape == (1, n)
        assert transmittances.shape == (1, image_height, image_width) and (transmittances == 1).all()
        assert isect_offsets.shape == (1, -(-image_height // tile_size), -(-image_width // tile_size))
        assert range_start == 0 and len(flatten_ids) <= range_end * tile_size**2 < 2**32 * tile_size**2
        assert flatten_ids.dtype == isect_offsets.dtype == torch.int32 and flatten_ids.is_contiguous()
        calls.append({"pairs": len(flatten_ids)})
        starts = [*isect_offsets.flatten().tolist(), len(flatten_ids)]
        assert starts == sorted(starts) and starts[0] == 0
        splats = torch.cat([means2d[0], conics[0], opacities[0, :, None]], 1).tolist()
        lists = flatten_ids.tolist()
        ids, pixels = [], []
        for y in range(image_height):
            for x in range(image_width):
                tile = y // tile_size * isect_offsets.shape[-1] + x // tile_size
                left = 1.0
                for g in lists[starts[tile] : starts[tile + 1]]:
                    mean_x, mean_y, a, b, c, opacity = splats[g]
                    dx, dy = mean_x - x - 0.5, mean_y - y - 0.5
                    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
                    alpha = min(ALPHA_MAX, opacity * math.exp(-sigma))
                    if sigma < 0 or alpha < ALPHA_MIN:
                        continue
                    if left * (1 - alpha) <= T_STOP:
                        break
                    left *= 1 - alpha
                    ids.append(g)
                    pixels.append(y * image_width + x)
        return torch.tensor(ids).long(), torch.tensor(pixels).long(), torch.zeros(len(ids)).long()

    return rasterize_to_indices_in_range


def with_tiles(**arguments: Any) -> Any:
    """`rasterization` by the twin, with what gsplat's meta holds beyond: the tiles' lists."""
    assert arguments.pop("backend") == "gsplat" and len(arguments["viewmats"]) == 1
    image, alphas, meta = rasterization(**arguments, backend="torch")
    size = (arguments["width"], arguments["height"])
    near = [t.near for t in twin.tiles(meta["means2d"][0], meta["radii"][0], meta["depths"][0], *size)]
    starts = np.cumsum([0, *map(len, near)])[:-1].reshape(1, meta["tile_height"], meta["tile_width"])
    meta["isect_offsets"] = torch.from_numpy(starts).int()
    meta["flatten_ids"] = torch.cat(near).int()
    return image, alphas, meta


@pytest.mark.parametrize("pairs", [1, 256 * 30, 2**40])
def test_gsplat_lists_are_composited(monkeypatch: pytest.MonkeyPatch, pairs: int):
    calls: list[dict[str, Any]] = []
    fake = SimpleNamespace(rasterize_to_indices_in_range=listing(calls))
    monkeypatch.setitem(sys.modules, "gsplat", fake)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(lifting, "rasterization", with_tiles)
    monkeypatch.setattr(backends, "chosen", lambda backend, means: backend)  # no CUDA tensors here
    monkeypatch.setattr(lifting, "PAIRS", pairs)
    solid = cloud(8, 60, views=1, width=20, height=18, size=0.4)
    solid["opacities"] = SCENES["clear_and_solid"]()["opacities"]
    for scene in (cloud(8, 60, width=21, height=20), solid, SCENES["behind"]()):
        calls.clear()
        exact = to(geometry(scene, *SIZE), torch.float64)
        found = contributions(**exact, rasterize_mode="antialiased", backend="gsplat")
        expected = contributions(**exact, rasterize_mode="antialiased", backend="torch")
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        if pairs == 2**40:
            assert len(calls) <= 2, "one for each camera that sees something"
        elif calls:
            assert len(calls) >= 4, "tiles"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [k for k in SCENES if k != "needles"] + ["cloud"])
def test_gsplat_agrees_with_the_twin(name: str):
    pytest.importorskip("gsplat")
    scene = cloud(9, 500, width=100, height=80) if name == "cloud" else SCENES[name]()
    exact, rough = to(geometry(scene), torch.float64), to(geometry(scene), "cuda")
    maps = random_maps(scene, 3)
    for a, b in zip(backprojection(**rough, maps=maps), backprojection(**exact, maps=maps), strict=True):
        assert_near(a.cpu(), b, 2e-3)
    size = {k: scene[k] for k in SIZE}
    ids, best, pixels = (t.cpu() for t in contributions(**rough, **size))
    assert ids.dtype == pixels.dtype == torch.int64
    _, exact_best, exact_pixels = contributions(**exact, **size)
    assert ((best - exact_best).abs() > 2e-3).sum() <= max(2, best.numel() // 200)
    assert (pixels - exact_pixels).abs().sum() <= max(4, int(exact_pixels.sum()) // 200)
    if len(scene["means"]):
        weights = torch.from_numpy(dense(scene))
        chosen = weights.gather(1, ids.clamp_min(0)[:, None])[:, 0]
        assert ((chosen - exact_best).abs() > 2e-3).sum() <= max(2, best.numel() // 200)
