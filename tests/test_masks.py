"""Masks: each kind against known rows, the algebra, growing and shrinking, files."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splatedit.errors import InputError
from splatedit.files import save as save_splats
from splatedit.gaussians import SH_C0, Gaussians
from splatedit.mask_files import load, save
from splatedit.masks import (
    All,
    Box,
    Grown,
    Indices,
    Matching,
    Not,
    Relevance,
    Rule,
    Some,
    Sphere,
    box,
    describe,
    rule,
    sphere,
)
from splatedit.matching import TOLERANCES, as_chunks, as_fixed_point, as_log_steps, assign

pytestmark = pytest.mark.usefixtures("one_thread")


def scene(means, colors=(0.5, 0.5, 0.5), opacity=0.5, scale=0.1, **extra):
    means = torch.tensor(means, dtype=torch.float32).reshape(-1, 3)
    n = len(means)

    def column(value, *shape):
        return torch.as_tensor(value, dtype=torch.float64).expand(n, *shape)

    return Gaussians(
        means=means,
        quats=torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1),
        scales=column(scale, 3).log().float(),
        opacities=column(opacity).logit().float(),
        sh0=((column(colors, 3) - 0.5) / SH_C0).float()[:, None],
        shN=torch.zeros(n, 0, 3),
        extra={k: np.asarray(v) for k, v in extra.items()},
    )


def rows(mask, gaussians):
    chosen = mask(gaussians)
    assert chosen.dtype == torch.bool and chosen.shape == (gaussians.n,)
    return chosen.nonzero()[:, 0].tolist()


LINE = scene([[x, 0, 0] for x in range(6)])  # at x = 0 1 2 3 4 5


# --------------------------------------------------------------------------------------------------- each kind
def test_a_box_holds_what_is_in_it_faces_included():
    corners = scene([[0, 0, 0], [1, 2, 3], [-1, -2, -3], [1.01, 0, 0], [0, 2.01, 0], [0, 0, -3.01], [1, 2, 0]])
    assert rows(Box((0, 0, 0), (2, 4, 6)), corners) == [0, 1, 2, 6]
    assert rows(Box((1, 2, 3), (0.5, 0.5, 0.5)), corners) == [1]


def test_a_turned_box_turns_about_its_centre():
    half = math.sqrt(0.5)
    quarter = (half, 0, 0, half)  # a quarter turn about z: the long edge now lies along y
    points = scene([[1, 0, 0], [1, 1.9, 0], [1, -1.9, 0], [2.9, 0, 0], [-0.9, 0, 0], [1.4, 0, 0]])
    assert rows(Box((1, 0, 0), (4, 1, 1)), points) == [0, 3, 4, 5]
    assert rows(Box((1, 0, 0), (4, 1, 1), quarter), points) == [0, 1, 2, 5]
    assert rows(Box((1, 0, 0), (4, 1, 1), tuple(-3 * q for q in quarter)), points) == [0, 1, 2, 5]
    eighth = (math.cos(math.pi / 8), 0, 0, math.sin(math.pi / 8))
    diagonal = scene([[1, 1, 0], [1, -1, 0], [-1, -1, 0]])
    assert rows(Box((0, 0, 0), (4, 0.1, 1), eighth), diagonal) == [0, 2]


def test_a_sphere_holds_its_surface():
    assert rows(Sphere((1, 0, 0), 2), LINE) == [0, 1, 2, 3]
    assert rows(Sphere((2.5, 0, 0), 0.4), LINE) == []


def test_rules_compare_what_the_splat_shows():
    two = scene(
        [[0, 1, 2], [3, 4, 5]],
        colors=[[1, 0, 0], [0.2, 0.4, 0.6]],
        opacity=[0.05, 0.9],
        scale=[[0.1, 0.2, 0.3], [0.01, 0.5, 0.02]],
        label=np.array([7, 8], np.int32),
    )
    for text, expected in {
        "opacity < 0.1": [0],
        "opacity>=0.1": [1],
        "scale > 0.4": [1],
        "scale <= 0.31": [0],
        "red > 0.9": [0],
        "green > 0.39": [1],
        "blue < 0.61": [0, 1],
        "x > 1": [1],
        "y <= 1": [0],
        "z == 5": [1],
        "z != 5": [0],
        "color(1, 0, 0) < 0.01": [0],
        "colour(1,0,0) > 0.1": [1],
        "label == 8": [1],
        "x < 1 or y > 3.5": [0, 1],
        "x < 1 and y > 3.5": [],
        "x < 1 and y > 3.5 or z > 4": [1],
    }.items():
        assert rows(rule(text), two) == expected, text
    away = Rule("color(0.2,0.4,0.1)", "<", 0.5).values(two)
    torch.testing.assert_close(away, torch.tensor([math.sqrt(0.64 + 0.16 + 0.01), 0.5]).double(), rtol=0, atol=1e-6)


def test_rows_by_number():
    assert rows(Indices([4, 1, 1]), LINE) == [1, 4]
    assert rows(Indices([]), LINE) == []


def test_relevance_above_its_threshold():
    assert rows(Relevance(np.array([0, 0.5, 0.2, 0.9, 0.5, 1]), 0.5), LINE) == [3, 5]


def test_masks_cannot_be_changed():
    mask, given = Indices(np.array([1, 2])), np.array([1.0, 2.0])
    with pytest.raises(AttributeError):
        mask.rows = np.array([3])
    with pytest.raises(ValueError):
        mask.rows[0] = 3
    relevance = Relevance(given, 0.5)
    given[0] = 7
    assert relevance.values[0] == 1


# ----------------------------------------------------------------------------------------- a selection saved apart
def random_scene(n=400, seed=0):
    rng = np.random.default_rng(seed)
    return scene(
        rng.normal(0, 2, (n, 3)),
        rng.random((n, 3)),
        torch.from_numpy(rng.uniform(0.1, 0.9, n)),
        rng.uniform(0.01, 0.1, (n, 3)),
    )


def test_a_selection_saved_apart_is_found_row_by_row(tmp_path):
    whole, chosen = random_scene(), torch.randperm(400, generator=torch.Generator().manual_seed(1))[:90]
    save_splats(whole.select(chosen), tmp_path / "selection.ply")
    mask = load(tmp_path / "selection.ply")
    assert isinstance(mask, Matching)
    assert mask.found(whole).tolist() == chosen.tolist()
    assert rows(mask, whole) == sorted(chosen.tolist())
    assert describe(mask, whole) == ["in selection.ply (90 Gaussians): 90 of 400"]


def test_of_gaussians_at_one_place_the_one_that_looks_alike_is_found():
    twins = scene([[1, 1, 1]] * 3, colors=[[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    for row in range(3):
        assert rows(Matching.of(twins.select([row])), twins) == [row]
    same = scene([[1, 1, 1]] * 3)
    assert len(rows(Matching.of(same.select([0, 1])), same)) == 2, "no row twice"


def test_what_is_not_in_the_scene_is_counted():
    other = random_scene(seed=5)
    both = other._replace(
        **{k: torch.cat([v[:3], random_scene().parameters[k][:2]]) for k, v in other.parameters.items()}
    )
    assert Matching.of(both).found(random_scene()).tolist() == [-1, -1, -1, 0, 1]
    (line,) = describe(Matching.of(both, name="s.ply"), random_scene())
    assert line == "in s.ply (5 Gaussians): 2 of 400; 3 of its Gaussians are not in the scene"


def rounded(kind, points):
    """Positions (n, 3) as the format keeps them, by its definition."""
    if kind == "ksplat":  # from the middle of a block
        return np.round(points / 2.5 * 32767) / 32767 * 2.5
    if kind == "spz":
        return np.round(points * 4096) / 4096
    if kind == "sog":
        log = np.sign(points) * np.log1p(np.abs(points))
        low, high = log.min(0), log.max(0)
        back = np.round((log - low) / (high - low) * 65535) / 65535 * (high - low) + low
        return np.sign(back) * np.expm1(np.abs(back))
    parts = []
    for part in np.split(points, range(256, len(points), 256)):
        low, high, steps = part.min(0), part.max(0), np.array([2047, 1023, 2047])
        parts.append(np.round((part - low) / (high - low) * steps) / steps * (high - low) + low)
    return np.concatenate(parts)


@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("seed", range(3))
def test_positions_a_format_has_rounded_are_within_its_tolerance(kind, seed):
    whole = random_scene(600, seed)
    chosen = torch.arange(0, 600, 2)
    kept = rounded(kind, whole.means[chosen].double().numpy())
    part = whole.select(chosen)._replace(means=torch.from_numpy(kept).float())
    mask = Matching.of(part, kind)
    gone = np.linalg.norm(kept - whole.means[chosen].double().numpy(), axis=1)
    assert gone.max() > 1e-5, "rounded at all"
    assert (gone <= mask.tolerance).all() and mask.tolerance.max() < 0.05
    assert mask.found(whole).tolist() == chosen.tolist()
    assert Matching.of(part, "ply").found(whole).tolist().count(-1) > 250, "as exact positions they are others"


def test_tolerances_are_of_formats():
    from splatedit.formats import FORMATS

    assert set(TOLERANCES) < set(FORMATS)


@pytest.mark.parametrize("name", ["s.compressed.ply", "s.ply", "s.spz", "s.sog", "s.splat"])
def test_a_selection_saved_in_any_format_is_found(name, tmp_path):
    whole, written = random_scene(), tmp_path / name
    chosen = torch.arange(1, 400, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the format loses
        save_splats(whole.select(chosen), written)
    assert rows(load(written), whole) == chosen.tolist()
    if name == "s.compressed.ply":
        assert rows(load(written.rename(tmp_path / "renamed.ply")), whole) == chosen.tolist()


def test_steps_of_formats():
    np.testing.assert_allclose(as_fixed_point(np.array([[0.25, 1, 2]])), [math.sqrt(3) / 4], rtol=1e-5)
    np.testing.assert_allclose(as_chunks(np.array([[0.0, 0, 0], [2047, 0, 0]])), [1, 1], rtol=2e-3)
    np.testing.assert_allclose(
        as_log_steps(np.array([[0.0, 0, 0], [math.e - 1, 0, 0]])), [1 / 65535, math.e / 65535], rtol=0.1
    )


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_assignment_is_one_to_one_and_stable(seed):
    rng = np.random.default_rng(seed)
    m, k, n = rng.integers(1, 12), rng.integers(1, 5), rng.integers(5, 9)
    near = np.stack([rng.permutation(n)[:k] for _ in range(m)])
    cost = np.where(rng.random((m, k)) < 0.3, np.inf, rng.integers(0, 4, (m, k)))
    found = assign(near, cost, n)
    used = found[found >= 0]
    assert len(set(used)) == len(used)
    price = {}
    for row, target in enumerate(found):
        if target >= 0:
            price[target] = float(cost[row][near[row] == target][0])
            assert math.isfinite(price[target])
    for row in range(m):  # what a row would rather have went to one that it costs no more
        for target, own in zip(near[row], cost[row], strict=True):
            if np.isfinite(own) and found[row] < 0:
                assert target in price
            if np.isfinite(own) and found[row] >= 0 and own < price[found[row]]:
                assert price.get(target, np.inf) <= own


# ------------------------------------------------------------------------------------------------------ algebra
CLOUD = scene(np.random.default_rng(0).normal(0, 1, (60, 3)))
coordinate = st.floats(-2, 2, allow_nan=False)
leaves = st.one_of(
    st.builds(Sphere, st.tuples(coordinate, coordinate, coordinate), st.floats(0.1, 3)),
    st.builds(Box, st.tuples(coordinate, coordinate, coordinate), st.tuples(*[st.floats(0.1, 4)] * 3)),
    st.builds(Rule, st.sampled_from(["x", "y", "z"]), st.sampled_from(["<", ">="]), coordinate),
    st.builds(Indices, st.lists(st.integers(0, 59)), st.sampled_from([None, 60])),
    st.builds(Relevance, st.lists(st.floats(0, 1, width=32), min_size=60, max_size=60), st.floats(0, 1)),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(Grown, inner, st.floats(0, 1)),
    ),
    max_leaves=5,
)
few = settings(max_examples=25, deadline=None)


@given(leaves, leaves, leaves)
@few
def test_algebra(a, b, c):
    def equal(left, right):
        assert left(CLOUD).equal(right(CLOUD))

    equal(~~a, a)
    equal(~(a & b), ~a | ~b)
    equal(~(a | b), ~a & ~b)
    equal(a & (b | c), (a & b) | (a & c))
    equal(a & b, b & a)
    equal(a | (b | c), (a | b) | c)
    assert not (a & ~a)(CLOUD).any() and (a | ~a)(CLOUD).all()
    assert (a & b)(CLOUD).equal(a(CLOUD) & b(CLOUD)) and (a | b)(CLOUD).equal(a(CLOUD) | b(CLOUD))


@given(leaves, st.floats(0, 1), st.floats(0, 1))
@few
def test_growing_and_shrinking(mask, small, more):
    def held(inner, outer):
        return bool((~inner(CLOUD) | outer(CLOUD)).all())

    grown, shrunk = mask.grow(small), mask.shrink(small)
    assert held(mask, grown) and held(shrunk, mask)
    assert held(grown, mask.grow(small + more)) and held(mask.shrink(small + more), shrunk)
    assert (~mask).grow(small)(CLOUD).equal((~mask.shrink(small))(CLOUD))
    assert held(mask, grown.shrink(small)) and held(shrunk.grow(small), mask)
    chosen, apart = mask(CLOUD), torch.cdist(CLOUD.means.double(), CLOUD.means.double())  # every pair, no tree
    near = (apart <= small)[:, chosen].any(1)
    margin = ((apart - small).abs() < 1e-6)[:, chosen].any(1)
    assert ((grown(CLOUD) == (chosen | near)) | margin).all()


def test_growing_reaches_exactly_so_far():
    mask = Indices([0])
    assert rows(mask.grow(2), LINE) == [0, 1, 2] and rows(mask.grow(1.99), LINE) == [0, 1]
    assert rows(mask.grow(0), LINE) == [0]
    inner = Sphere((0, 0, 0), 3.5)  # 0 to 3
    assert rows(inner.shrink(1), LINE) == [0, 1, 2] and rows(inner.shrink(0.99), LINE) == [0, 1, 2, 3]
    assert rows(inner.shrink(100), LINE) == []
    assert rows(Sphere((0, 0, 0), 99).shrink(1), LINE) == [0, 1, 2, 3, 4, 5], "no outside, nothing to shrink from"
    assert rows(Indices([]).grow(9), LINE) == []
    lost = LINE._replace(means=LINE.means.index_fill(0, torch.tensor([1]), math.nan))
    assert rows(mask.grow(2), lost) == [0, 2]


def test_describing_counts_every_part():
    mask = All((Sphere((0, 0, 0), 3), ~(rule("x < 1") | Indices([5], name="a.npy").grow(1))))
    assert describe(mask, LINE) == [
        "all of these: 3 of 6",
        "  sphere around 0,0,0 of radius 3: 4 of 6",
        "  not this: 3 of 6",
        "    any of these: 3 of 6",
        "      x < 1: 1 of 6",
        "      this and what lies within 1 of it: 2 of 6",
        "        rows of a.npy: 1 of 6",
    ]


# -------------------------------------------------------------------------------------------------------- files
@given(trees)
@few
def test_a_saved_mask_is_the_same_mask(tmp_path_factory, mask):
    path = tmp_path_factory.mktemp("m") / "mask.json"
    save(mask, path)
    again = load(path)
    assert again == mask and again(CLOUD).equal(mask(CLOUD))
    assert again == load(path) and again != Not(again)


def test_long_arrays_come_back_bit_for_bit(tmp_path):
    whole = random_scene(500)
    for number, mask in enumerate(
        (
            Matching.of(whole.select(slice(100)), "spz", "s.spz"),
            Relevance(np.random.default_rng(0).random(500, np.float32), 0.25, "auto"),
            Indices(np.arange(0, 500, 3), 500, "rows.npy"),
        )
    ):
        save(mask, tmp_path / f"{number}.json")
        again = load(tmp_path / f"{number}.json")
        assert again == mask and again(whole).equal(mask(whole)) and str(again) == str(mask)
        assert type(again) is type(mask)


def test_saving_is_the_same_everywhere(tmp_path):
    save(Box((0, 0, 0), (1, 1, 1)) & rule("opacity < 0.1"), tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text()) == {
        "splatedit_mask": 1,
        "mask": {
            "kind": "all",
            "masks": [
                {"kind": "box", "centre": [0.0, 0.0, 0.0], "size": [1.0, 1.0, 1.0], "rotation": [1.0, 0.0, 0.0, 0.0]},
                {"kind": "rule", "quantity": "opacity", "sign": "<", "value": 0.1},
            ],
        },
    }


def test_lists_of_rows(tmp_path):
    chosen = np.array([True, False, False, True, False, False])
    np.save(tmp_path / "rows.npy", np.array([3, 0], np.uint16))
    np.save(tmp_path / "mask.npy", chosen)
    np.savez_compressed(tmp_path / "rows.npz", rows=np.array([0, 3]))
    (tmp_path / "rows.txt").write_text("# the paw\n0, 3\n3\n")
    (tmp_path / "rows.json").write_text("[0, 3]")
    (tmp_path / "mask.json").write_text(json.dumps(chosen.tolist()))
    for path in tmp_path.iterdir():
        assert rows(load(path), LINE) == [0, 3], path.name
    np.save(tmp_path / "none.npy", np.array([]))
    assert rows(load(tmp_path / "none.npy"), LINE) == []


# ----------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: box("1,2,3"), ["mask_box", "1,2,3", "cx,cy,cz,sx,sy,sz"]),
        (lambda: box("0,0,0,1,1,x"), ["mask_box", "0,0,0,1,1,x"]),
        (lambda: box("0,0,0,1,0,1"), ["edges", "above 0"]),
        (lambda: box("0,0,0,1,1,1,0,0,0,0"), ["quaternion"]),
        (lambda: sphere("0,0,0,0"), ["sphere: radius", "found 0", "above 0"]),
        (lambda: sphere("0,0,0,nan"), ["mask_sphere", "x,y,z,r"]),
        (lambda: rule("opacity"), ["mask_rule", "'opacity'", "opacity < 0.1"]),
        (lambda: rule("opacity < many"), ["opacity", "many"]),
        (lambda: rule("opacity << 1"), ["mask_rule"]),
        (lambda: rule("color(1,0) < 1"), ["color(1,0)", "3 numbers"]),
        (lambda: rule("color(1,0,300) < 1"), ["[0, 1]"]),
        (lambda: Rule("opacity", "~", 1), ["'~'", "<="]),
        (lambda: rule("opacty < 1")(LINE), ["'opacty'", "opacity, scale", "color(r,g,b)"]),
        (lambda: Indices([-1]), ["row -1", "from 0"]),
        (lambda: Indices([6])(LINE), ["row 6", "6 Gaussians"]),
        (lambda: Indices([0], of=7)(LINE), ["7", "6"]),
        (lambda: Indices([0.5]), ["float64"]),
        (lambda: Relevance([0.1], 0.5)(LINE), ["1 Gaussians", "6"]),
        (lambda: Relevance([math.nan], 0.5), ["finite"]),
        (lambda: Indices([1]).grow(-1), ["grow", "-1"]),
        (lambda: Sphere((0, 0, 0), 1).shrink(math.inf), ["grow", "inf"]),
        (lambda: Some(()), ["expected masks"]),
        (lambda: Matching(np.zeros((2, 2)), np.zeros((2, 7)), np.zeros(2)), ["points", "[2, 2]"]),
    ],
)
def test_a_mistake_is_one_line_that_helps(make, words):
    with pytest.raises(InputError) as error:
        make()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.json", b"{", ["not a sound .json"]),
        ("m.json", b"{}", ["neither a mask of splatedit nor a list"]),
        ("m.json", b"[1, true]", ["together"]),
        ("m.json", b"[1.5]", ["list of rows"]),
        ("m.json", b"[-1]", ["row -1"]),
        ("m.json", b"[1e999]", ["list of rows"]),
        ("m.json", b"[" * 100_000, ["not a sound .json"]),
        ("m.json", b'{"splatedit_mask": 2}', ["version 2", "update splatedit"]),
        ("m.json", b'{"splatedit_mask": 1}', ["NoneType", "box, sphere"]),
        ("m.json", b'{"splatedit_mask": 1, "mask": {"kind": "bax"}}', ["'bax'", "box"]),
        ("m.json", b'{"splatedit_mask": 1, "mask": {"kind": "box"}}', ["box", "centre"]),
        ("m.json", b'{"splatedit_mask": 1, "mask": {"kind": "box", "centr": 1}}', ["unknown centr"]),
        (
            "m.json",
            b'{"splatedit_mask": 1, "mask": {"kind": "sphere", "centre": "abc", "radius": 1}}',
            ["sphere: centre"],
        ),
        ("m.json", b'{"splatedit_mask": 1, "mask": {"kind": "not", "mask": 3}}', ["expected masks"]),
        ("m.json", b'{"splatedit_mask": 1, "mask": {"kind": "all", "masks": []}}', ["expected masks"]),
        (
            "m.json",
            b'{"splatedit_mask": 1, "mask": ' + b'{"kind": "not", "mask": ' * 200 + b"1" + b"}" * 201,
            ["100 deep"],
        ),
        (
            "m.json",
            b'{"splatedit_mask": 1, "mask": {"kind": "rows", "rows": {"type": "<i8", "shape": [9], "zlib": "eA=="}}}',
            ["rows: rows", "not a sound array"],
        ),
        (
            "m.json",
            b'{"splatedit_mask": 1, "mask": {"kind": "rows", "rows": {"type": "O", "shape": [1], "list": [1]}}}',
            ["not a sound array"],
        ),
        (
            "m.json",
            b'{"splatedit_mask": 1, "mask": {"kind": "rows", "rows": {"type": "<i8", "shape": [9876543210], "zlib": ""}}}',  # noqa: E501
            ["sensible size"],
        ),
        ("m.txt", b"1 2 three", ["'three'", "whole number"]),
        ("m.txt", b"1 -2", ["'-2'"]),
        ("m.txt", b"99999999999999999999999", ["row 1099511627776"]),
        ("m.txt", b"\xff\xfe", ["not a sound .txt"]),
        (
            "m.npy",
            b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999,), }",
            [".npy"],
        ),
        ("m.npy", b"rubbish", ["not a sound .npy"]),
        ("m.npz", b"PK\x03\x04rubbish", ["not a sound .npz"]),
        ("m.docx", b"", ["cannot be a mask", ".npy", ".ply"]),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load(tmp_path / name)(LINE)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    for word in (name, *words):
        assert word in str(error.value)


def test_files_that_are_not_there_or_hold_code(tmp_path):
    with pytest.raises(InputError, match="nothing.npy: cannot be read"):
        load(tmp_path / "nothing.npy")
    with pytest.raises(InputError, match="nothing.ply: no such file"):
        load(tmp_path / "nothing.ply")
    np.save(tmp_path / "code.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(InputError, match="code.npy: not a sound"):
        load(tmp_path / "code.npy")
    np.savez(tmp_path / "two.npz", a=np.arange(3), b=np.arange(3))
    with pytest.raises(InputError, match="two.npz.*2 arrays"):
        load(tmp_path / "two.npz")
    np.save(tmp_path / "square.npy", np.eye(3, dtype=bool))
    with pytest.raises(InputError, match=r"square.npy: found bool \[3, 3\]"):
        load(tmp_path / "square.npy")


@pytest.fixture
def sound(tmp_path):
    """A file of each kind that `load` reads, but for splats."""
    tree = (Box((0, 0, 0), (1, 1, 1)) | rule("x < 1 and color(1,0,0) < 1")).grow(0.1) & ~Indices(range(0, 60, 2), 60)
    save(tree | Relevance(np.linspace(0, 1, 60), 0.5) | Matching.of(CLOUD.select([1, 2, 3])), tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps(list(range(40))))
    (tmp_path / "c.txt").write_text(" ".join(map(str, range(40))))
    np.save(tmp_path / "d.npy", np.arange(50))
    np.savez_compressed(tmp_path / "e.npz", np.arange(60) > 4)
    for path in tmp_path.iterdir():
        assert load(path)(CLOUD).any()
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_are_masks_still_or_one_clear_line(count, sound):
    rng, told = np.random.default_rng(0), 0
    strange = [b"9" * 30, b"-", b"NaN", b"null", b"[", b"{", b"1e999", bytes(8), b'"']
    for turn in range(count):
        path = sound[turn % len(sound)]
        data = bytearray(path.read_bytes())
        low, high = sorted(rng.integers(0, len(data), 2))
        kind = rng.integers(4)
        if kind == 0:
            data[low] = rng.integers(256)
        elif kind == 1:
            data[low : min(high, low + 30)] = b""
        elif kind == 2:
            data[low:low] = strange[rng.integers(len(strange))]
        else:
            del data[low:]
        damaged = path.with_name(f"damaged{path.suffix}")
        damaged.write_bytes(data)
        try:
            assert load(damaged)(CLOUD).shape == (60,)
        except InputError as error:
            told += 1
            assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 600
    assert told > count / 4
