"""Rows and what the optimiser remembers of them; relocation; gsplat's strategies on a CPU."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raster_scenes import cloud
from torch import Tensor

from splatedit.errors import InputError
from splatedit.render import densify, rasterization
from splatedit.render.twin import rotation

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh0": (1, 3), "shN": (0, 3)}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "amsgrad": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussians(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Leaf tensors as a splat file holds them, and two that nothing optimises: `frozen`, and a number, `label`."""
    g = generator(seed)
    parameters = {k: torch.randn(n, *shape, generator=g).requires_grad_() for k, shape in SHAPES.items()}
    return {**parameters, "frozen": torch.randn(n, 2, generator=g), "label": torch.arange(n)}


def pull(parameters: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One optimiser step with the same random gradients for the same seed and row."""
    g = generator(seed)
    for parameter in parameters.values():
        if parameter.requires_grad:
            rows = torch.randn(500, *parameter.shape[1:], generator=g)
            parameter.grad = rows[parameters["label"]]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def trained(n: int, kind: str = "adam") -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """Parameters, and one optimiser with a group for each, as `splatedit.scenes.Splats` has it, three steps old."""
    parameters = gaussians(n)
    optimizer = OPTIMIZERS[kind]([{"params": [p], "name": k} for k, p in parameters.items() if p.requires_grad])
    for seed in range(3):
        pull(parameters, optimizer, seed)
    return parameters, optimizer


def snapshot(parameters: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All per-Gaussian tensors by name: parameters, and the optimiser's own."""
    tensors = {k: p.detach().clone() for k, p in parameters.items()}
    for k, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.dim():
                tensors[f"{k} {key}"] = value.clone()
    return tensors


def assert_rows_follow(before: dict[str, Tensor], after: dict[str, Tensor], rows: densify.Rows) -> None:
    """Rows that are not fresh have the bits of their source everywhere; of the others the optimiser knows nothing."""
    assert before.keys() == after.keys()
    assert any(" " in name for name in before), "an optimiser with a memory"
    for name, value in after.items():
        assert len(value) == len(rows.source) == len(rows.fresh), name
        assert torch.equal(value[~rows.fresh], before[name][rows.source[~rows.fresh]]), name
        if " " in name:
            assert not value[rows.fresh].any(), name


# ---------------------------------------------------------------- rows


def mask(n: int, every: int) -> Tensor:
    return torch.arange(n) % every == 0


EDITS: dict[str, Callable[[Any, Any], densify.Rows]] = {
    "duplicate": lambda p, o: densify.duplicate(p, o, mask(len(p["means"]), 3)),
    "split": lambda p, o: densify.split(p, o, mask(len(p["means"]), 3), generator()),
    "prune": lambda p, o: densify.prune(p, o, mask(len(p["means"]), 3)),
    "clone": lambda p, o: densify.clone(p, o, torch.tensor([4, 1, 4])),
    "add": lambda p, o: densify.add(p, o, 7, generator()),
    "relocate": lambda p, o: densify.relocate(p, o, mask(len(p["means"]), 5), generator()),
}
COUNTS = {"duplicate": 40, "split": 40, "prune": 20, "clone": 33, "add": 37, "relocate": 30}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", EDITS)
def test_what_the_optimiser_remembers_follows_the_rows(name: str, kind: str):
    parameters, optimizer = trained(30, kind)
    before = snapshot(parameters, optimizer)
    rows = EDITS[name](parameters, optimizer)
    assert len(parameters["means"]) == COUNTS[name]
    assert_rows_follow(before, snapshot(parameters, optimizer), rows)
    assert torch.equal(parameters["label"], rows.source), "what nobody optimises follows as well"
    assert {k for k, p in parameters.items() if p.requires_grad} == set(SHAPES)
    groups = {g["name"]: g["params"] for g in optimizer.param_groups}
    assert all(len(groups[k]) == 1 and groups[k][0] is parameters[k] for k in SHAPES)
    assert set(optimizer.state) <= {p for p in parameters.values()}, "nothing is left of the old tensors"


@pytest.mark.parametrize("name", ["duplicate", "split", "clone", "add", "relocate"])
def test_untouched_rows_go_on_as_if_nothing_had_happened(name: str):
    parameters, optimizer = trained(30)
    plain, plain_optimizer = copy.deepcopy((parameters, optimizer))
    rows = EDITS[name](parameters, optimizer)
    for seed in range(10, 14):
        pull(parameters, optimizer, seed)
        pull(plain, plain_optimizer, seed)
    after, expected = snapshot(parameters, optimizer), snapshot(plain, plain_optimizer)
    for key, value in after.items():
        assert torch.equal(value[~rows.fresh], expected[key][rows.source[~rows.fresh]]), key


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_order_of_rows(data: st.DataObject):
    n = data.draw(st.integers(1, 8))
    source = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=12)), dtype=torch.int64)
    count = len(source)
    fresh = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    parameters, optimizer = trained(n)
    before = snapshot(parameters, optimizer)
    values = {"opacities": torch.full((int(fresh.sum()),), 7.0)}
    rows = densify.rearrange(parameters, optimizer, source, fresh, values)
    after = snapshot(parameters, optimizer)
    assert_rows_follow(before, after, rows)
    assert (after["opacities"][fresh] == 7).all()
    assert torch.equal(after["means"], before["means"][source]), "without a value given, a copy"


def test_optimisers_come_as_one_or_as_a_dictionary_or_a_list():
    """gsplat wants a dictionary with one for each parameter, and an nn.ParameterDict."""
    ours, one = trained(20)
    theirs = torch.nn.ParameterDict({k: p.detach().clone() for k, p in gaussians(20).items() if p.requires_grad})
    several = {k: torch.optim.Adam([p]) for k, p in theirs.items()}
    for seed in range(3):
        for k, optimizer in several.items():
            pull({k: theirs[k], "label": torch.arange(20)}, optimizer, seed)
    before = {k: snapshot({k: theirs[k]}, several[k]) for k in theirs}
    rows = densify.split(theirs, several, mask(20, 4), generator())
    for k, parameter in theirs.items():
        assert isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad
        assert_rows_follow(before[k], snapshot({k: parameter}, several[k]), rows)
    densify.split(ours, iter([one]), mask(20, 4), generator())
    assert ours["means"].shape == theirs["means"].shape == (25, 3)


def test_a_scene_under_edit_goes_on_with_more_rows():
    """`Splats` of an edit: its dictionary and its one Adam are changed in place, and it draws and steps on."""
    from splatedit.cameras import orbit
    from splatedit.files import load
    from splatedit.scenes import Splats

    gaussians = load(Path(__file__).parent.parent / "scenes" / "cat.ply").select(slice(0, None, 100))
    scene = Splats(gaussians, orbit(gaussians, 2, size=32), 1.0, neighbours=0, supersample=1)
    for step in range(3):
        scene(range(2)).rgb.square().mean().backward()
        scene.step(0.0, 1.0)
        if step == 1:
            rows = densify.split(scene.parameters, scene.optimizer, mask(gaussians.n, 3), generator())
    assert scene.gaussians.n == len(rows.source) == gaussians.n + len(range(0, gaussians.n, 3))
    held = {id(p) for group in scene.optimizer.param_groups for p in group["params"]}
    assert held <= {id(p) for p in scene.parameters.values()}


def test_a_gradient_between_backward_and_step_follows():
    parameters, optimizer = trained(6)
    for p in parameters.values():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    densify.duplicate(parameters, optimizer, mask(6, 3))
    assert parameters["means"].grad is not None
    assert parameters["means"].grad.sum(1).tolist() == [3.0] * 6 + [0.0] * 2


def test_before_the_first_step_there_is_nothing_to_carry():
    parameters = gaussians(6)
    optimizer = torch.optim.Adam([p for p in parameters.values() if p.requires_grad])  # one group of all
    densify.duplicate(parameters, optimizer, mask(6, 2))
    assert not optimizer.state
    assert [p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters.values(), strict=False)] == [
        True
    ] * 6


def test_split_puts_two_smaller_ones_in_the_place_of_one():
    parameters = gaussians(4000)
    with torch.no_grad():
        for k in ("means", "quats", "scales", "opacities"):
            parameters[k][:] = parameters[k][:1].clone()
        parameters["scales"][:] = torch.tensor([0.0, -1.0, -3.0])
    before = {k: p.detach().clone() for k, p in parameters.items()}
    densify.split(parameters, [], torch.ones(4000, dtype=torch.bool), generator(5))
    torch.testing.assert_close(parameters["scales"].exp(), before["scales"].repeat(2, 1).exp() / 1.6)
    assert torch.equal(parameters["opacities"], before["opacities"].repeat(2))
    axes = rotation(before["quats"][:1])[0]
    moved = (parameters["means"] - before["means"][:1]) @ axes  # along the axes of the ellipsoid
    spread = torch.tensor([1.0, math.exp(-1), math.exp(-3)])
    assert (moved.mean(0).abs() < 5 * spread / 8000**0.5).all()
    torch.testing.assert_close(moved.std(0), spread, rtol=5 / (2 * 8000) ** 0.5, atol=0)
    assert torch.equal(parameters["label"], before["label"].repeat(2))


def test_split_keeps_alpha_on_request():
    parameters = gaussians(50)
    one = parameters["opacities"].detach().sigmoid()
    densify.split(parameters, [], torch.ones(50, dtype=torch.bool), generator(), same_alpha=True)
    two = parameters["opacities"].detach().sigmoid().reshape(2, 50)
    torch.testing.assert_close(1 - (1 - two[0]) * (1 - two[1]), one)
    solid = {**gaussians(3), "opacities": torch.full((3,), 50.0)}
    densify.split(solid, [], torch.ones(3, dtype=torch.bool), generator(), same_alpha=True)
    assert (solid["opacities"] > 15).all() and torch.isfinite(solid["opacities"]).all()


def test_halves_look_as_the_whole_did():
    """Where they are is known; the picture is far nearer to what it was than after `split`."""
    parameters, optimizer = trained(6)
    before = {k: p.detach().clone() for k, p in parameters.items()}
    chosen = mask(6, 3)
    rows = densify.halve(parameters, optimizer, chosen)
    old, new = chosen.nonzero()[:, 0].repeat(2), slice(int((~chosen).sum()), None)
    assert torch.equal(rows.source, torch.cat([(~chosen).nonzero()[:, 0], old])) and rows.fresh[new].all()
    for i, k in enumerate(old):
        scales = before["scales"][k]
        axis, longest = rotation(before["quats"][k])[:, scales.argmax()], scales.max().exp()
        way = parameters["means"].detach()[new][i] - before["means"][k]
        torch.testing.assert_close(way, (1 if 2 * i < len(old) else -1) * 0.5 * longest * axis, rtol=1e-4, atol=1e-6)
        ratio = (parameters["scales"].detach()[new][i] - scales).exp()
        assert sorted(ratio.tolist()) == pytest.approx([0.7, 1, 1], rel=1e-5)
    half = parameters["opacities"].detach()[new].sigmoid()
    torch.testing.assert_close(1 - (1 - half) ** 2, before["opacities"][old].sigmoid())

    scene = cloud(7, 300, views=2, width=64, height=64, sh_degree=0, size=0.1)
    raw = {"means": scene["means"], "quats": scene["quats"]}
    raw |= {"scales": scene["scales"].log(), "opacities": scene["opacities"].logit(), "colors": scene["colors"]}
    pictures = []
    for change in (
        lambda p: None,
        lambda p: densify.halve(p, [], mask(300, 3)),
        lambda p: densify.split(p, [], mask(300, 3), generator()),
    ):
        now = {k: v.clone() for k, v in raw.items()}
        change(now)
        shown = {**scene, **now, "scales": now["scales"].exp(), "opacities": now["opacities"].sigmoid()}
        pictures.append(rasterization(**shown)[0])
    halved, divided = (float(-10 * (p - pictures[0]).square().mean().log10()) for p in pictures[1:])
    assert halved > divided + 8 and halved > 35, (halved, divided)


def test_an_edit_may_grow_where_it_looks_and_nowhere_else():
    """The recipe of docs/renderer.md: the best pulled tenth inside a mask, at most so many, all else bit for bit."""
    parameters, optimizer = trained(200)
    before = snapshot(parameters, optimizer)
    inside = mask(200, 2)
    pulled = torch.rand(200, generator=generator(3))
    limit = 205
    chosen = inside & (pulled >= pulled[inside].quantile(0.9))
    assert chosen.sum() == 10
    room = limit - len(chosen)
    best = torch.zeros_like(chosen)
    best[torch.where(chosen, pulled, -1).topk(min(room, int(chosen.sum()))).indices] = True
    rows = densify.split(parameters, optimizer, best, generator())
    inside = inside[rows.source]
    assert len(parameters["means"]) == limit and inside.sum() == 105
    assert_rows_follow(before, snapshot(parameters, optimizer), rows)
    assert not (rows.fresh & ~inside).any()
    rows = densify.prune(parameters, optimizer, inside & (parameters["opacities"] < -1))
    kept = parameters["label"][~inside[rows.source]]
    assert torch.equal(kept, torch.arange(1, 200, 2)) and len(parameters["means"]) < limit


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: densify.prune(p, [], torch.zeros(4, dtype=torch.bool)), r"a mask \(4,\) .* where \(6,\)"),
        (lambda p: densify.prune(p, [], torch.zeros(6)), "torch.float32 where .* torch.bool"),
        (lambda p: densify.add(p, [], 1, among=torch.zeros(6, dtype=torch.bool)), "none of 6 Gaussians"),
        (lambda p: densify.add(p, [], 1, among=torch.ones(4, dtype=torch.bool)), r"a mask \(4,\)"),
        (lambda p: densify.jitter(p, 1.0, chosen=torch.zeros(4, dtype=torch.bool)), r"a mask \(4,\)"),
        (lambda p: densify.split({"means": p["means"]}, [], mask(6, 2)), "no 'quats'"),
        (lambda p: densify.duplicate({**p, "sh0": p["sh0"][:5]}, [], mask(6, 2)), "differ .*'sh0': 5"),
        (lambda p: densify.relocate(p, [], torch.ones(6, dtype=torch.bool)), "none of 6 Gaussians is alive"),
        (lambda p: densify.screen_gradients({"means2d": torch.zeros(1, 6, 2)}), "retain_grad"),
        (lambda p: densify.screen_gradients({"means2d": torch.zeros(1, 6, 2)}, absgrad=True), "absgrad=True"),
    ],
)
def test_mistakes_are_named_and_nothing_is_changed(call: Callable[[Any], Any], message: str):
    parameters = gaussians(6)
    before = dict(parameters)
    with pytest.raises(InputError, match=message):
        call(parameters)
    assert all(parameters[k] is v for k, v in before.items())


# ---------------------------------------------------------------- relocation


def published(opacity: float, copies: int) -> tuple[float, float]:
    """New opacity and factor of the scales by the double sum of arXiv 2404.09591, equation 9, as it is printed."""
    new = 1 - (1 - opacity) ** (1 / copies)
    total = sum(
        math.comb(i - 1, k) * (-1) ** k / math.sqrt(k + 1) * new ** (k + 1)
        for i in range(1, copies + 1)
        for k in range(i)
    )
    return new, opacity / total


def test_relocation_is_the_published_sum():
    opacities = [0.005, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999]
    pairs = [(o, n) for o in opacities for n in (1, 2, 3, 7, 20, 51)]
    o, n = (torch.tensor(column) for column in zip(*pairs, strict=True))
    scales = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64).expand(len(pairs), 3)
    new, scaled = densify.relocation(o.double(), scales, n)
    exact = torch.tensor(
        [published(a, int(b)) for a, b in zip(o.double().tolist(), n, strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(new, exact[:, 0], rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled, exact[:, 1:] * scales, rtol=1e-9, atol=0)
    rough = densify.relocation(o, scales.float(), n)
    assert rough[0].dtype == rough[1].dtype == torch.float32
    torch.testing.assert_close(rough[0].double(), exact[:, 0])
    torch.testing.assert_close(rough[1].double(), exact[:, 1:] * scales)


def test_relocation_keeps_opacity_at_the_centre_and_along_a_line():
    """Integrated numerically: what N copies hide of a line through the centre is what the one hid."""
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    for opacity in (0.01, 0.3, 0.9, 0.999, 1.0):
        for copies in (1, 2, 5, 51):
            o, scale = torch.tensor([opacity], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
            new, scaled = densify.relocation(o, scale, torch.tensor([copies]))
            torch.testing.assert_close(1 - (1 - new) ** copies, o, rtol=1e-12, atol=0)
            hidden = 1 - (1 - new * torch.exp(-(x**2) / (2 * scaled[0] ** 2))) ** copies
            torch.testing.assert_close(hidden.sum(), (o * torch.exp(-(x**2) / 2)).sum(), rtol=1e-6, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1, width=32), st.integers(-3, 200))
def test_relocation_of_anything(opacity: float, ratio: int):
    scales = torch.tensor([[0.1, 3.0, 1e-6]])
    new, scaled = densify.relocation(torch.tensor([opacity]), scales, torch.tensor([ratio]))
    assert 0 <= new <= opacity and (0 < scaled).all() and (scaled <= scales).all()
    if ratio <= 1:
        assert new == opacity and torch.equal(scaled, scales), "one is itself"
    if ratio > 51:
        assert new == densify.relocation(torch.tensor([opacity]), scales, torch.tensor([51]))[0], "as gsplat clamps"


def test_relocation_of_none():
    new, scaled = densify.relocation(torch.zeros(0), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert new.shape == (0,) and scaled.shape == (0, 3)


def alpha_of(copies: int, opacity: Tensor, scales: Tensor) -> Tensor:
    """A picture (65, 65) of `copies` Gaussians at one place, whose centre is that of the pixel in the middle."""
    means, quats = torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[0.9, 0.1, 0.3, 0.2]])
    K = torch.tensor([[[40.0, 0, 32.5], [0, 40.0, 32.5], [0, 0, 1]]])
    rows = (t.repeat(copies, *[1] * (t.dim() - 1)) for t in (means, quats, scales, opacity, torch.ones(1, 1)))
    return rasterization(*rows, torch.eye(4)[None], K, 65, 65, eps2d=0.0)[1][0, :, :, 0]


@pytest.mark.parametrize("copies", [2, 3, 5])
@pytest.mark.parametrize("opacity", [0.3, 0.6, 0.9, 0.99])
def test_copies_look_as_the_one_did(opacity: float, copies: int):
    """Drawn by the kernels: exact at the centre, along a line up to the cut at 1/255, and nearly everywhere else."""
    old, scales = torch.tensor([opacity]), torch.tensor([[0.3, 0.2, 0.25]])
    new, smaller = densify.relocation(old, scales, torch.tensor([copies]))
    one, many, naive = alpha_of(1, old, scales), alpha_of(copies, new, smaller), alpha_of(copies, new, scales)
    assert abs(one[32, 32] - opacity) < 1e-6 and abs(many[32, 32] - one[32, 32]) < 1e-6
    assert abs(many[32].sum() / one[32].sum() - 1) < 0.025 and abs(many[:, 32].sum() / one[:, 32].sum() - 1) < 0.025
    error, unscaled = (many - one).abs(), (naive - one).abs()
    assert error.max() < 0.13 and error.mean() < 0.01
    if opacity > 0.5:  # of fainter ones the cut at 1/255 takes more than the scales give
        assert error.max() < 0.75 * unscaled.max()


@pytest.mark.parametrize(("copies", "lost"), [(5, 1 / 6), (20, 3 / 4)])
def test_what_the_cut_takes_from_faint_copies_is_what_the_documentation_says(copies: int, lost: float):
    old, scales = torch.tensor([0.1]), torch.tensor([[0.3, 0.2, 0.25]])
    new, smaller = densify.relocation(old, scales, torch.tensor([copies]))
    shown = alpha_of(copies, new, smaller).sum() / alpha_of(1, old, scales).sum()
    assert shown.item() == pytest.approx(1 - lost, abs=0.01)


def test_clone_leaves_the_pixel_as_it_is():
    """Copies by `clone` do not show where `duplicate` makes the picture denser; one row is picked twice."""
    scene = cloud(3, 30, sh_degree=0, size=0.2)
    rest = {k: scene[k] for k in ("viewmats", "Ks", "width", "height", "sh_degree", "backgrounds")}

    def stored() -> dict[str, Tensor]:
        return {
            "means": scene["means"],
            "quats": scene["quats"],
            "scales": scene["scales"].log(),
            "opacities": scene["opacities"].logit(),
            "sh0": scene["colors"],
        }

    def error(p: dict[str, Tensor]) -> float:
        shown = (p["means"], p["quats"], p["scales"].exp(), p["opacities"].sigmoid(), p["sh0"])
        return (rasterization(*shown, **rest)[0] - rasterization(**scene)[0]).abs().mean().item()

    cloned, doubled = stored(), stored()
    densify.clone(cloned, [], torch.tensor([0, 3, 3, 7, 11, 12, 15]))
    densify.duplicate(doubled, [], torch.isin(torch.arange(30), torch.tensor([0, 3, 7, 11, 12, 15])))
    assert len(cloned["means"]) == 37
    assert error(stored()) < 1e-5 and error(cloned) < 0.5 * error(doubled)
    three = cloned["opacities"][[3, 31, 32]].sigmoid()
    torch.testing.assert_close(1 - (1 - three).prod(), scene["opacities"][3])


def test_the_dead_move_onto_the_living():
    parameters = gaussians(400)
    with torch.no_grad():
        parameters["opacities"][:] = torch.where(torch.arange(400) < 4, torch.tensor(2.0), torch.tensor(-1.0))
        parameters["opacities"][100:] = -9.0
    old = {k: p.detach().clone() for k, p in parameters.items()}
    dead = parameters["opacities"].detach().sigmoid() <= 0.005
    rows = densify.relocate(parameters, [], dead, generator(1))
    assert torch.equal(rows.source[~dead], torch.arange(100)) and (rows.source[dead] < 100).all()
    assert torch.equal(parameters["means"], old["means"][rows.source]) and len(parameters["means"]) == 400
    # every place shows what it showed, up to the floor of the opacity
    for place in range(100):
        there = rows.source == place
        together = 1 - (1 - parameters["opacities"][there].detach().double().sigmoid()).prod()
        assert together == pytest.approx(old["opacities"][place].double().sigmoid().item(), rel=1e-6)
        assert rows.fresh[there].all() == (there.sum() > 1)
    # four are three times as opaque as the other 96: 4 * 0.881 of 4 * 0.881 + 96 * 0.269 should get the 300
    expected = 300 * 4 * 0.8808 / (4 * 0.8808 + 96 * 0.26894)
    assert abs((rows.source[dead] < 4).sum() - expected) < 4 * expected**0.5
    assert torch.equal(rows.source, densify.relocate(copy.deepcopy(old), [], dead, generator(1)).source), "seeded"


def test_added_ones_are_copies_and_none_is_below_the_floor():
    parameters = gaussians(10)
    with torch.no_grad():
        parameters["opacities"][:] = -30.0
        parameters["opacities"][4] = 30.0  # drawn every time, and as opaque as a number can be
    rows = densify.add(parameters, [], 60, generator())
    assert torch.equal(rows.source[10:], torch.full((60,), 4)) and torch.equal(
        rows.fresh.nonzero()[:, 0][1:], torch.arange(10, 70)
    )
    assert all(torch.isfinite(p).all() for p in parameters.values())
    faint = gaussians(10)
    with torch.no_grad():
        faint["opacities"][:] = -5.0
    densify.add(faint, [], 60, generator(), min_opacity=0.005)
    assert faint["opacities"].detach().sigmoid().min() >= 0.005 * (1 - 1e-6)


def test_a_weight_of_nothing_is_never_drawn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape, dtype=torch.float64))
    assert densify._draw(torch.tensor([0.0, 0.0, 1.0, 2.0]), 3, None).tolist() == [2, 2, 2], "the smallest number"
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 1 - 2.0**-53, dtype=torch.float64))
    assert densify._draw(torch.tensor([0.3, 0.2, 0.1, 0.0]), 3, None).tolist() == [2, 2, 2], "the largest"


def test_nothing_to_do_changes_nothing():
    parameters, optimizer = trained(10)
    before, nobody = snapshot(parameters, optimizer), torch.zeros(10, dtype=torch.bool)
    densify.duplicate(parameters, optimizer, nobody)
    densify.split(parameters, optimizer, nobody)
    densify.prune(parameters, optimizer, nobody)
    densify.relocate(parameters, optimizer, nobody)
    densify.add(parameters, optimizer, -3)
    after = snapshot(parameters, optimizer)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    densify.prune(parameters, optimizer, ~nobody)
    densify.add(parameters, optimizer, 0)
    densify.relocate(parameters, optimizer, nobody[:0])
    densify.jitter(parameters, 1.0)
    assert {k: len(v) for k, v in parameters.items()} == dict.fromkeys(parameters, 0)


def test_masks_confine_the_markov_chain_to_an_edit():
    """What lies outside keeps its bits and its moments: not copied, not dimmed, not shaken."""
    parameters, optimizer = trained(100)
    before, inside = snapshot(parameters, optimizer), mask(100, 2)
    dead = inside & (parameters["opacities"].detach() < -0.5)
    moved = densify.relocate(parameters, optimizer, dead, generator(1), among=inside)
    added = densify.add(parameters, optimizer, 30, generator(2), among=inside)
    inside_now = inside[added.source]
    densify.jitter(parameters, 50.0, generator(3), chosen=inside_now)
    after = snapshot(parameters, optimizer)
    assert dead.sum() > 5 and inside[moved.source][dead].all() and inside_now[100:].all()
    for key, value in after.items():
        assert torch.equal(value[~inside_now], before[key][~inside]), key
    assert (after["means"][:100] != before["means"])[inside].any(), "the others did move"


def test_opacities_may_be_a_column():
    flat, column = gaussians(30), gaussians(30)
    column["opacities"] = column["opacities"].detach()[:, None].requires_grad_()
    for p in (flat, column):
        densify.relocate(p, [], mask(30, 3), generator(1))
        densify.add(p, [], 4, generator(2))
        densify.split(p, [], mask(34, 5), generator(3), same_alpha=True)
        densify.jitter(p, 1.0, generator(4))
    assert column["opacities"].shape == (41, 1)
    assert torch.equal(flat["opacities"], column["opacities"][:, 0]) and torch.equal(flat["means"], column["means"])


def test_jitter_is_the_covariance_times_noise_and_spares_the_opaque():
    parameters = gaussians(20)
    with torch.no_grad():
        parameters["opacities"][:] = torch.linspace(-12, 3, 20)
    before = parameters["means"].detach().clone()
    means = parameters["means"]
    densify.jitter(parameters, 0.3, generator(9))
    assert parameters["means"] is means, "in place: the optimiser holds the same tensor"
    noise = torch.randn(20, 3, generator=generator(9))
    for i in range(20):
        axes, scales = rotation(parameters["quats"].detach()[i]), parameters["scales"].detach()[i].exp()
        covariance = axes @ torch.diag(scales**2) @ axes.T
        faint = 1 / (1 + math.exp(100 * (torch.sigmoid(parameters["opacities"][i]).item() - 0.005)))
        torch.testing.assert_close(means[i], before[i] + 0.3 * faint * covariance @ noise[i], rtol=1e-4, atol=1e-5)
    assert torch.equal(means[-1], before[-1]) and not torch.equal(means[0], before[0])
    again = means.detach().clone()
    densify.jitter(parameters, 0.3, generator(9), chosen=torch.arange(20) < 2)
    assert torch.equal(means[2:], again[2:]) and (means[:2] != again[:2]).all()


# ---------------------------------------------------------------- gsplat's strategies on a CPU


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # ours, gsplat's
    "duplicate": (densify.duplicate, lambda ops, p, o, c: ops.duplicate(p, o, {}, c)),
    "prune": (densify.prune, lambda ops, p, o, c: ops.remove(p, o, {}, c)),
    "split": (densify.split, lambda ops, p, o, c: ops.split(p, o, {}, c)),
    "split same_alpha": (
        lambda p, o, c: densify.split(p, o, c, same_alpha=True),
        lambda ops, p, o, c: ops.split(p, o, {}, c, revised_opacity=True),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_rows_change_as_gsplat_changes_them(name: str):
    """Parameters and moments, in the same order, from the same random numbers."""
    ops = pytest.importorskip("gsplat.strategy.ops")
    ours, theirs = PAIRS[name]
    results = []
    for edit in (ours, lambda *arguments: theirs(ops, *arguments)):
        params = torch.nn.ParameterDict({k: p.detach() for k, p in gaussians(30).items() if p.requires_grad})
        optimizers = {k: torch.optim.Adam([p]) for k, p in params.items()}
        for k, p in params.items():
            p.grad = p.detach().clone()
            optimizers[k].step()
            p.grad = None
        torch.manual_seed(0)
        edit(params, optimizers, mask(30, 3))
        results.append({f"{k} {key}": v for k in params for key, v in snapshot({k: params[k]}, optimizers[k]).items()})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 18
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["relocate", "add"])
def test_relocation_changes_rows_as_gsplat_does(name: str, monkeypatch: pytest.MonkeyPatch):
    """gsplat's own functions with its CUDA kernel replaced by `relocation` and its draws by ours."""
    ops = pytest.importorskip("gsplat.strategy.ops")
    dead = mask(30, 3)
    ours, theirs = gaussians(30), {k: p.detach() for k, p in gaussians(30).items() if p.requires_grad}
    if name == "relocate":
        picks = densify.relocate(ours, [], dead, generator()).source[dead]
        picks = (~dead).cumsum(0)[picks] - 1  # counted among the living
    else:
        picks = densify.add(ours, [], 20, generator()).source[30:]
    kernel = lambda opacities, scales, ratios, binoms: densify.relocation(opacities, scales, ratios)  # noqa: E731
    monkeypatch.setattr(ops, "compute_relocation", kernel)
    monkeypatch.setattr(ops, "_multinomial_sample", lambda weights, n, replacement: picks)
    if name == "relocate":
        ops.relocate(theirs, {}, {}, dead, torch.zeros(51, 51))
    else:
        ops.sample_add(theirs, {}, {}, 20, torch.zeros(51, 51))
    assert len(picks.unique()) < len(picks), "some are drawn twice"
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key].detach(), value.detach(), rtol=1e-5, atol=1e-5)


class Standing:
    """The strategy that does nothing."""

    check_sanity = initialize_state = step_pre_backward = step_post_backward = lambda *_, **__: None


def fit(
    strategy: Any, *, start: int = 40, steps: int = 180, absgrad: bool = False, **post: Any
) -> tuple[Any, Any, float]:
    """Fit `start` Gaussians to 4 pictures of 250; parameters, optimisers and the PSNR reached in decibels."""
    target = cloud(3, 250, views=4, width=48, height=40, sh_degree=0, size=0.07)
    cameras = {k: target[k] for k in ("viewmats", "Ks", "width", "height", "sh_degree", "backgrounds")}
    truth = rasterization(**target)[0]
    first = cloud(4, start, sh_degree=0, size=0.12)
    params = torch.nn.ParameterDict(
        {
            "means": first["means"],
            "quats": first["quats"],
            "scales": first["scales"].log(),
            "opacities": torch.zeros(start),
            "sh0": torch.zeros(start, 1, 3),
        }
    )
    rates = {"means": 5e-3, "quats": 1e-2, "scales": 2e-2, "opacities": 5e-2, "sh0": 5e-2}
    optimizers = {k: torch.optim.Adam([p], rates[k], eps=1e-15) for k, p in params.items()}
    strategy.check_sanity(params, optimizers)
    state = strategy.initialize_state()
    psnr = 0.0
    for step in range(steps):
        shown = (params["means"], params["quats"], params["scales"].exp(), params["opacities"].sigmoid(), params["sh0"])
        image, _, meta = rasterization(*shown, **cameras, absgrad=absgrad)
        strategy.step_pre_backward(params, optimizers, state, step, meta)
        (image - truth).abs().mean().backward()
        psnr = -10 * (image.detach() - truth).square().mean().log10().item()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        strategy.step_post_backward(params, optimizers, state, step, meta, **post)
    for name, optimizer in optimizers.items():
        (parameter,) = optimizer.param_groups[0]["params"]
        assert parameter is params[name] and list(optimizer.state) == [parameter]
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    return params, optimizers, psnr


@pytest.mark.parametrize("absgrad", [False, True])
def test_default_strategy_of_gsplat_densifies_on_a_cpu(absgrad: bool):
    gsplat = pytest.importorskip("gsplat")
    strategy = gsplat.DefaultStrategy(
        refine_start_iter=20,
        refine_every=20,
        refine_stop_iter=141,
        grow_grad2d=8e-3 if absgrad else 2e-3,
        grow_scale3d=0.1,
        absgrad=absgrad,
    )
    _, _, before = fit(Standing())
    torch.manual_seed(0)  # gsplat splits with torch's global generator
    params, _, after = fit(strategy, absgrad=absgrad)
    assert len(params["means"]) > 120, "of 40 at the start"
    assert after > before + 5, "decibels above as many steps with the first 40"


@pytest.mark.parametrize("absgrad", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_what_default_strategy_accumulates_is_screen_gradients(backend: str, absgrad: bool):
    """Every backend's `meta` holds what gsplat's strategy asks for; the sums are ours, and the same on both."""
    gsplat = pytest.importorskip("gsplat")
    scene = cloud(5, 60, views=3, size=0.3)
    scene["means"] = scene["means"].clone().requires_grad_()
    strategy = gsplat.DefaultStrategy(absgrad=absgrad, refine_scale2d_stop_iter=10)
    state, params = strategy.initialize_state(), {"means": scene["means"]}
    sums, views = torch.zeros(60), torch.zeros(60)
    for step in range(2):
        scene["viewmats"] = scene["viewmats"].roll(step, 0) * 1.0
        image, _, meta = rasterization(**scene, absgrad=absgrad, backend=backend)
        strategy.step_pre_backward(params, {}, state, step, meta)
        (image * torch.linspace(-1, 1, image.numel()).reshape(image.shape)).sum().backward()
        strategy._update_state(params, state, meta)
        pulled, seen = densify.screen_gradients(meta, absgrad=absgrad)
        sums, views = sums + pulled, views + seen
    assert sums.any() and (views == state["count"]).all() and 0 < views.max() <= 6
    torch.testing.assert_close(sums, state["grad2d"], rtol=1e-5, atol=1e-6)
    assert 0 < state["radii"].max(), "which the strategy uses with refine_scale2d_stop_iter"


def test_mcmc_strategy_moves_the_dead_and_grows_to_its_cap_on_a_cpu():
    gsplat = pytest.importorskip("gsplat")
    options: dict[str, Any] = {
        "refine_start_iter": 20,
        "refine_every": 7,
        "refine_stop_iter": 141,
        "cap_max": 80,
        "min_opacity": 0.05,
        "noise_lr": 5e4,
    }

    def run(seed: int) -> tuple[Any, float]:
        strategy = densify.mcmc_strategy(generator(seed), **options)
        assert isinstance(strategy, gsplat.MCMCStrategy)
        params, _, psnr = fit(strategy, lr=5e-3)
        return params, psnr

    _, _, before = fit(Standing())
    (params, after), (same, _), (other, _) = run(1), run(1), run(2)
    assert len(params["means"]) == 80, "the cap"
    assert after > before + 1, "decibels"
    assert all(torch.equal(params[k], same[k]) for k in params), "all randomness is in the generator"
    assert not torch.equal(params["means"], other["means"])


def test_mcmc_strategy_refines_when_gsplat_would():
    """Dead ones move and 5 % are added at gsplat's steps, noise falls always; newer gsplat can stop that."""
    pytest.importorskip("gsplat")
    strategy = densify.mcmc_strategy(
        generator(), refine_start_iter=10, refine_stop_iter=40, refine_every=10, verbose=False
    )
    for step, count in ((10, 100), (15, 100), (20, 105), (30, 110), (40, 110)):
        params = torch.nn.ParameterDict(
            {k: p for k, p in gaussians(100 if step < 30 else 105).items() if p.requires_grad}
        )
        with torch.no_grad():
            params["opacities"][:30] = -9.0
        optimizers = {k: torch.optim.Adam([p]) for k, p in params.items()}
        means = params["means"].detach().clone()
        strategy.step_post_backward(params, optimizers, strategy.initialize_state(), step, {}, lr=1e-9)
        assert len(params["means"]) == (count if step < 40 else 105), step
        dead = params["opacities"].sigmoid() <= strategy.min_opacity
        assert int(dead.sum()) == (30 if count == 100 or step == 40 else 0), step
        assert not torch.equal(params["means"][: len(means)], means), "noise"
    strategy.noise_injection_stop_iter = 5
    params = torch.nn.ParameterDict({k: p for k, p in gaussians(10).items() if p.requires_grad})
    with torch.no_grad():
        params["opacities"][:] = -9.0
    means = params["means"].detach().clone()
    for step, moves in ((5, False), (4, True)):
        strategy.step_post_backward(params, {}, {}, step, {}, lr=1e-6)
        assert torch.equal(params["means"], means) != moves


def test_without_gsplat_mcmc_strategy_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    densify._mcmc_class.cache_clear()
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(InputError, match="pip install gsplat.*relocate, add and jitter"):
        densify.mcmc_strategy()


# ---------------------------------------------------------------- the documentation


def test_the_examples_of_the_documentation_run(monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).parent.parent
    section = (root / "docs" / "renderer.md").read_text().partition("## Densification\n")[2].partition("\n## ")[0]
    ours, theirs = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    monkeypatch.chdir(root)  # scenes/cat.ply
    names: dict[str, Any] = {}
    exec(compile(ours, "docs/renderer.md", "exec"), names)
    grown = len(names["parameters"]["means"])
    assert 300 == names["few"].n < grown == len(names["inside"]) < 360 and names["inside"].sum() > grown / 2
    for name in ("duplicate", "split", "prune", "clone", "add", "relocate", "jitter", "rearrange", "mcmc_strategy"):
        assert name in densify.__all__ and f"`{name}" in section or f"densify.{name}" in section, name
    pytest.importorskip("gsplat")
    torch.manual_seed(0)
    exec(compile(theirs, "docs/renderer.md", "exec"), names)
    assert len(names["parameters"]["means"]) > 600


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_relocation_agrees_with_gsplat():
    gsplat = pytest.importorskip("gsplat.relocation")
    g = generator()
    opacities, scales = torch.rand(500, generator=g) * 0.99 + 0.005, torch.rand(500, 3, generator=g)
    ratios = torch.randint(1, 60, (500,), generator=g)
    binoms = densify.mcmc_strategy().initialize_state()["binoms"].cuda()
    theirs = gsplat.compute_relocation(opacities.cuda(), scales.cuda(), ratios.cuda(), binoms)
    for a, b in zip(densify.relocation(opacities.cuda(), scales.cuda(), ratios.cuda()), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_mcmc_strategy_of_cuda_tensors_is_gsplats():
    gsplat = pytest.importorskip("gsplat")
    results = []
    for strategy in (gsplat.MCMCStrategy(), densify.mcmc_strategy()):
        torch.manual_seed(0)
        params = torch.nn.ParameterDict({k: p.detach().cuda() for k, p in gaussians(100).items() if p.requires_grad})
        optimizers = {k: torch.optim.Adam([p]) for k, p in params.items()}
        for k, p in params.items():
            p.grad = torch.ones_like(p)
            optimizers[k].step()
        strategy.step_post_backward(params, optimizers, strategy.initialize_state(), 600, {}, lr=1e-3)
        results.append(params["means"])
    assert len(results[0]) == 105 and torch.equal(*results)
