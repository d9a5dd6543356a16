import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from rich.console import Console

from splatedit import blending, deltas, files, records, stack
from splatedit.blending import Named, blend, fade, reapply
from splatedit.cli import main
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.stack import Stack, push

pytestmark = pytest.mark.usefixtures("one_thread")


def scene(n=6, seed=0, degree=0, **more):
    """n random splats with an extra column."""
    rng = torch.Generator().manual_seed(seed)
    k = (degree + 1) ** 2 - 1
    return Gaussians(
        means=torch.randn(n, 3, generator=rng),
        quats=torch.randn(n, 4, generator=rng),
        scales=torch.randn(n, 3, generator=rng) - 2,
        opacities=torch.randn(n, generator=rng),
        sh0=torch.randn(n, 1, 3, generator=rng),
        shN=torch.randn(n, k, 3, generator=rng),
        **{"extra": {"label": np.arange(n, dtype=np.int32)}, "comments": ("made for a test",), **more},
    )


def edited(gaussians, seed=1, rows=None, note="an edit"):
    """Another scene made of this one: half of the rows changed, then `rows` taken (-1: a new one)."""
    fresh = scene(gaussians.n, 100 + seed, gaussians.sh_degree)
    mixed = {}
    for name, value in gaussians.parameters.items():
        mixed[name] = value.clone()
        mixed[name][::2] = fresh.parameters[name][::2]
    result = gaussians._replace(**mixed, comments=(*gaussians.comments, note))
    if rows is None:
        return result
    result = result.select(rows.clamp(min=0))
    for name, value in result.parameters.items():
        value[rows < 0] = scene(len(rows), 200 + seed, gaussians.sh_degree).parameters[name][rows < 0]
    return result


def ply(gaussians):
    """The bytes of its file."""
    return b"".join(stack.written(gaussians, "x.ply").pieces)


def sha(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def file(tmp_path):
    """A file with two edits in its history; states[i] is what it held after i of them."""
    return make(tmp_path)


def make(folder):
    path = folder / "edited.ply"
    path.write_bytes(ply(scene()))
    history = Stack.open(path)
    path.states = [path.read_bytes()] if hasattr(path, "__dict__") else None
    for seed in (1, 2):
        history.push(edited(files.load(path), seed), record={"prompt": f"prompt {seed}", "seed": seed})
    return path


def states(path):
    """The bytes of the file after 0, 1, 2 ... edits, without touching it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        shutil.copy(path, copy)
        shutil.copytree(f"{path}.history", f"{copy}.history")
        found = {}
        history = Stack.open(copy)
        for number in (0, *history.entries):
            history.goto(number)
            found[number] = copy.read_bytes()
        return found


# ------------------------------------------------------------------------------------------------------- differences
TYPES = {"f4": "float", "u1": "uchar", "i4": "int", "f8": "double", "i2": "short"}


def raw(rng, columns, count, order, before, tail):
    """A binary PLY with these columns, written here by hand, every bit pattern allowed (NaN too)."""
    kinds = np.dtype([(name, order + kind) for name, kind in columns])
    rows = np.frombuffer(rng.bytes(kinds.itemsize * count), kinds)
    word = {"<": "little", ">": "big"}[order]
    lines = [f"ply\nformat binary_{word}_endian 1.0\ncomment {rng.integers(99)}"]
    if before:
        lines.append("element camera 2\nproperty uchar a\nproperty short b")
    lines.append(f"element vertex {count}")
    lines += [f"property {TYPES[kind]} {name}" for name, kind in columns]
    if tail:
        lines.append("element face 1\nproperty list uchar int vertex_indices")
    return ("\n".join(lines) + "\nend_header\n").encode() + bytes(6) * before + rows.tobytes() + tail


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_either_side_of_a_difference_gives_the_other_bit_for_bit(seed):
    rng = np.random.default_rng(seed)
    columns = [(name, rng.choice(list(TYPES))) for name in ("x", "y", "a:b", "opacity")]
    other = [*columns[: rng.integers(1, 5)], ("added", "f4")] if rng.random() < 0.5 else columns
    other = [other[i] for i in rng.permutation(len(other))] if rng.random() < 0.3 else other
    order, tails = ("<", "<") if rng.random() < 0.7 else ("<", ">"), [b"", b"\1\0\0\0\7", b"\0"]
    n, m = rng.integers(0, 9, 2)
    first = raw(rng, columns, n, order[0], rng.random() < 0.3, tails[rng.integers(3)])
    second = raw(rng, other, m, order[1], rng.random() < 0.3, tails[rng.integers(3)])
    before = deltas.parse(first, rng.permutation(20)[:n])
    after = deltas.parse(second, rng.permutation(20)[:m])
    if n and columns == other and order[0] == order[1] and rng.random() < 0.7:  # few changes, as an edit makes them
        m = n
        data = bytearray(first)
        data[len(before.head) + rng.integers(before.rows.nbytes)] ^= 1
        second, after = bytes(data), deltas.parse(bytes(data), before.ids)
    stream = io.BytesIO()
    deltas.dump(deltas.difference(before, after), stream)
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as found:
        arrays = dict(found)
    for source, target, content, side in ((before, after, second, "after"), (after, before, first, "before")):
        made = deltas.apply(source, arrays, side)
        assert b"".join(made.pieces) == content
        np.testing.assert_array_equal(made.ids, target.ids)
    shared = len(np.intersect1d(before.ids, after.ids))
    counts = deltas.counts(arrays)
    assert counts["added"] == m - shared and counts["removed"] == n - shared and counts["changed"] <= shared


def test_a_difference_holds_only_what_changed():
    before = deltas.parse(ply(scene(1000)))
    after = scene(1000)
    after.means[7, 1] += 1
    arrays = deltas.difference(before, deltas.parse(ply(after)))
    assert set(arrays) == {"head_before", "head_after", "changed", "xor_1"}
    assert arrays["xor_1"].shape == (4, 1) and deltas.counts(arrays)["changed"] == 1
    stream = io.BytesIO()
    deltas.dump(arrays, stream)
    assert len(stream.getvalue()) < 2000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a ply",
        b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n",
        b"ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty list uchar int x\nend_header\n\0",
        b"ply\nformat binary_little_endian 1.0\nelement vertex 2\nproperty float x\nend_header\n1234",
        b"ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty half x\nend_header\n1234",
        b"ply\nformat binary_little_endian 1.0\nelement face 0\nproperty int x\nend_header\n",
    ],
)
def test_what_is_no_table_is_known(data):
    assert deltas.parse(data) is None


# ----------------------------------------------------------------------------------------------------- part strength
def turn(degrees, length=1.0, sign=1.0):
    """A turn about z as a quaternion."""
    half = math.radians(degrees) / 2
    return sign * length * torch.tensor([[math.cos(half), 0.0, 0.0, math.sin(half)]])


def test_half_way_is_half_way_in_what_files_store():
    before, after = scene(1), scene(1, 5)
    before, after = before._replace(quats=turn(10, 2.0)), after._replace(quats=turn(90, 4.0, sign=-1.0))
    half = blend(before.parameters, after.parameters, 0.5)
    for name in ("means", "scales", "opacities", "sh0"):
        expected = (before.parameters[name] + after.parameters[name]) / 2
        torch.testing.assert_close(half[name], expected)
    torch.testing.assert_close(half["quats"], turn(50, 3.0))  # the shorter way, though the signs differ


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_a_blend_meets_its_ends_and_keeps_what_is_equal(seed, strength):
    before = scene(8, seed, degree=1)
    after = edited(before, seed)
    for end, value in ((0.0, before), (1.0, after)):
        for name, found in blend(before.parameters, after.parameters, end).items():
            assert found.equal(value.parameters[name])
    for name, found in blend(before.parameters, after.parameters, strength).items():
        a, b = before.parameters[name], after.parameters[name]
        assert found[1::2].equal(a[1::2]), "equal rows stay, bit for bit"
        if name != "quats":
            assert ((found >= torch.minimum(a, b)) & (found <= torch.maximum(a, b))).all()


def test_fading_is_a_share_of_the_opacity():
    logit = torch.tensor([-40.0, -3.0, 0.0, 5.0, 40.0])
    for share in (0.01, 0.5, 0.99):
        torch.testing.assert_close(
            fade(logit, share).double().sigmoid(), share * logit.double().sigmoid(), rtol=1e-5, atol=0
        )
    assert fade(logit, 1.0).equal(logit)


def test_an_edit_is_applied_again_to_what_others_made():
    first = scene(4)
    second = first._replace(means=first.means + 1, quats=turn(30).repeat(4, 1), comments=("made for a test", "b"))
    first = first._replace(quats=turn(0).repeat(4, 1))
    elsewhere = first._replace(
        means=first.means.clone(), quats=turn(90).repeat(4, 1), comments=("made for a test", "a")
    )
    elsewhere.means[2] += 10
    ids = np.arange(4)
    made = reapply(Named(elsewhere, ids), Named(first, ids), Named(second, ids), 0.5).gaussians
    assert made.means[[0, 1, 3]].equal(torch.lerp(first.means.double(), second.means.double(), 0.5).float()[[0, 1, 3]])
    torch.testing.assert_close(made.means[2], elsewhere.means[2] + 0.5)
    torch.testing.assert_close(made.quats, turn(105).repeat(4, 1))
    assert made.scales.equal(first.scales), "what the edit left alone is left alone"
    assert made.comments == ("made for a test", "a", "b")


def test_rows_that_come_and_go_fade_by_opacity():
    before = Named(scene(4), np.arange(4))
    after = Named(scene(4).select([3, 0, 1, 1]), np.array([3, 0, 1, 4]))  # 2 removed, 4 added
    made = reapply(before, before, after, 0.25)
    assert made.ids.tolist() == [3, 0, 1, 4, 2], "in the order of the edit, then what it removed"
    opacity, old = made.gaussians.opacities.sigmoid(), before.gaussians.opacities.sigmoid()
    torch.testing.assert_close(opacity, torch.stack([old[3], old[0], old[1], old[1] * 0.25, old[2] * 0.75]))
    assert made.gaussians.extra["label"].tolist() == [3, 0, 1, 1, 2]
    whole = reapply(before, before, after, 1.0)
    assert whole.ids.tolist() == after.ids.tolist() and ply(whole.gaussians) == ply(after.gaussians)
    # On a scene that has not all of them, and one more.
    fewer = Named(scene(4).select([1, 2, 0]), np.array([1, 2, 9]))
    assert reapply(fewer, before, after, 1.0).ids.tolist() == [1, 4, 9]


# ----------------------------------------------------------------------------------------------- sequences of edits
class Editing(RuleBasedStateMachine):
    """Random edits, undo, redo, strengths and jumps; the model is the bytes that the file had after every entry."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "edited.ply"
        self.path.write_bytes(ply(scene()))
        self.bytes, self.parents, self.at, self.tip = {0: self.path.read_bytes()}, {}, 0, 0
        self.kinds = {}

    def line(self, number):
        return [*self.line(self.parents[number]), number] if number else []

    def new(self, entry, kind):
        assert entry.number not in self.bytes and entry.parent == self.at
        self.parents[entry.number], self.bytes[entry.number] = self.at, self.path.read_bytes()
        self.kinds[entry.number] = kind
        self.at = self.tip = entry.number

    @rule(seed=st.integers(0, 99), rows=st.none() | st.lists(st.integers(-1, 5), min_size=1, max_size=9))
    def edit(self, seed, rows):
        before = files.load(self.path)
        rows = None if rows is None else torch.tensor(rows).clamp(max=before.n - 1)
        self.new(Stack.open(self.path).push(edited(before, seed, rows), rows, {"seed": seed}), "edit")

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def undo(self, data):
        count = data.draw(st.integers(1, len(self.line(self.at))))
        Stack.open(self.path).undo(count)
        self.at = [0, *self.line(self.at)][-1 - count]

    @precondition(lambda self: self.at != self.tip)
    @rule(data=st.data())
    def redo(self, data):
        ahead = self.line(self.tip)[len(self.line(self.at)) :]
        count = data.draw(st.integers(1, len(ahead)))
        assert [e.number for e in Stack.open(self.path).redo(count)] == ahead[:count]
        self.at = ahead[count - 1]

    @precondition(lambda self: "edit" in [self.kinds[n] for n in self.line(self.at)])
    @rule(data=st.data(), value=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    def strength(self, data, value):
        edits = [n for n in self.line(self.at) if self.kinds[n] == "edit"]
        edit = data.draw(st.sampled_from(edits))
        history = Stack.open(self.path)
        before = stack.strengths(history.done)
        entry = history.strength(value, edit)
        if entry is None:
            assert before[edit] == value
            return
        self.new(entry, "strength")
        wanted = {**before, edit: value}
        for number in [0, *self.line(entry.parent)]:  # a state with these very strengths: met bit for bit
            if stack.strengths(history.line(number)) == wanted:
                assert self.path.read_bytes() == self.bytes[number]
        if value == 0 and edit == edits[-1] and all(v == 1 for n, v in before.items() if n != edit):
            if not any(self.kinds[n] == "strength" for n in self.line(self.parents[edit])):
                assert self.path.read_bytes() == self.bytes[self.parents[edit]]

    @precondition(lambda self: len(self.bytes) > 1)
    @rule(data=st.data())
    def goto(self, data):
        number = data.draw(st.sampled_from(sorted(self.bytes)))
        Stack.open(self.path).goto(number)
        self.at = number
        if number not in [0, *self.line(self.tip)]:
            self.tip = number
            while children := [n for n, p in self.parents.items() if p == self.tip]:
                self.tip = max(children)

    @invariant()
    def the_file_is_what_it_was(self):
        assert self.path.read_bytes() == self.bytes[self.at]
        history = Stack.open(self.path)
        assert (history.at, history.tip) == (self.at, self.tip) or len(set(self.bytes.values())) < len(self.bytes)
        assert [e.number for e in history.done] == self.line(self.at)
        assert not list(self.folder.rglob("*.part"))

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def test_some_sequences_of_edits():
    run_state_machine_as_test(Editing, settings=settings(max_examples=3, stateful_step_count=10, **QUIET))


@pytest.mark.slow
def test_many_sequences_of_edits():
    run_state_machine_as_test(Editing, settings=settings(max_examples=60, stateful_step_count=30, **QUIET))
