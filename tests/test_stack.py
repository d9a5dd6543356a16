import errno
import hashlib
import io
import json
import math
import os
import re
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

from splatedit import __version__, deltas, files, records, stack
from splatedit.blending import Named, blend, fade, reapply
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.stack import Stack, push, shows

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
    """A file with two edits in its history."""
    path = tmp_path / "edited.ply"
    path.write_bytes(ply(scene()))
    history = Stack.open(path)
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
    half = blend(before, after, 0.5).parameters
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
        for name, found in blend(before, after, end).parameters.items():
            assert found.equal(value.parameters[name])
    for name, found in blend(before, after, strength).parameters.items():
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


# ------------------------------------------------------------------------------------------ chains from run to run
def run_on(source, folder, note, rows=None, **record):
    """What a run does: read a scene file, write the edited one into a folder of its own, with its history."""
    before = files.load(source)
    folder.mkdir()
    path = folder / "edited.ply"
    files.save(edited(before, len(note), rows, note), path)
    push(path, before, rows, record, scene=source)
    return path


def test_a_second_run_goes_on_and_needs_nothing_of_the_first(tmp_path):
    source = tmp_path / "scene.ply"
    source.write_bytes(ply(scene(elements={"camera": np.array([(1, 2.0)], [("a", "u1"), ("b", "f8")])})))
    first = run_on(source, tmp_path / "1", "first")
    rows = torch.tensor([4, -1, 2, 0, -1, 5])
    second = run_on(first, tmp_path / "2", "the second", rows)
    third = run_on(second, tmp_path / "3", "and a third")
    contents = [path.read_bytes() for path in (source, first, second, third)]
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    source.unlink()
    history = Stack.open(third)
    assert [(e.number, e.parent) for e in history.done] == [(1, 0), (2, 1), (3, 2)]
    assert [(e.added, e.removed) for e in history.done] == [(0, 0), (2, 2), (0, 0)]
    assert [e.after for e in history.done] == [sha(content) for content in contents[1:]]
    for expected in contents[2::-1]:
        history.undo()
        assert third.read_bytes() == expected
    history.redo(3)
    assert third.read_bytes() == contents[3]
    assert history.gaussians(1).comments[-1] == "first" and history.gaussians().n == 6
    history.strength(0.5, 2)
    half = files.load(third)
    assert half.n == 8, "what was removed fades, as does what was added"
    assert half.comments[1:] == (
        "first",
        "the second",
        "and a third",
        f"splatedit {__version__}: strength 0.5 of edit 2",
    )


def test_part_strength_can_be_looked_at_before_it_is_written(tmp_path):
    source = tmp_path / "scene.ply"
    source.write_bytes(ply(scene()))
    first = run_on(source, tmp_path / "1", "first")
    file = run_on(first, tmp_path / "2", "the second", torch.tensor([0, 2, 3, 5, -1, -1]))
    history, content = Stack.open(file), file.read_bytes()
    for strength, edit in ((0.4, 1), (0.6, 2), (0.0, 2)):
        entries = len(history.entries)
        seen = history.weakened(strength, edit)
        assert file.read_bytes() == content and len(Stack.open(file).entries) == entries
        history.strength(strength, edit)
        assert ply(seen.gaussians) == file.read_bytes(), "bit for bit what is written"
        np.testing.assert_array_equal(seen.ids, history.named().ids)
        history.undo()
    assert history.weakened(1.0).ids.tolist() == [0, 2, 3, 5, 10, 11], (
        "kept ones keep their numbers, added ones are new"
    )
    with pytest.raises(InputError, match="7 is not an edit that is done"):
        history.weakened(0.5, 7)


def test_what_an_edited_file_shows(tmp_path):
    source = tmp_path / "scene.ply"
    source.write_bytes(ply(scene()))
    seen, unseen = {"prefers_target": 0.75}, {"prefers_target": 0.25}
    first = run_on(source, tmp_path / "1", "first", source_prompt="a cat", prompt="a pig", change=unseen)
    assert shows(source) is None and shows(first) == "a cat"
    Stack.open(first).note(1, change=seen)
    assert shows(first) == "a pig"
    second = run_on(first, tmp_path / "2", "the second", source_prompt="a pig", prompt="a dog", change=seen)
    assert shows(second) == "a dog"
    Stack.open(second).strength(0.3)
    assert shows(second) == "a pig"
    Stack.open(second).undo(3)
    assert shows(second) is None


def test_a_run_on_an_undone_file_leaves_out_what_was_undone(tmp_path):
    source = tmp_path / "scene.ply"
    source.write_bytes(ply(scene()))
    first = run_on(source, tmp_path / "1", "first")
    second = run_on(first, tmp_path / "2", "the second")
    Stack.open(second).undo()
    third = run_on(second, tmp_path / "3", "and a third")
    assert [e.number for e in Stack.open(third).done] == [1, 2] and len(Stack.open(third).entries) == 2
    assert [e.number for e in Stack.open(second).undone] == [2], "and is still where it was"
    Stack.open(third).undo(2)
    assert third.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("kind", ["ascii", "spz", "changed meanwhile", "gone meanwhile", "big endian", "columns"])
def test_what_a_run_began_with_is_kept_whatever_it_was(tmp_path, kind):
    """Binary PLY files come back byte for byte; of others, the scene as it was loaded."""
    before = scene()
    source = tmp_path / ("scene.spz" if kind == "spz" else "scene.ply")
    content = ply(before)
    state = deltas.parse(content)
    if kind == "big endian":
        swapped = state.rows.astype(state.rows.dtype.newbyteorder(">"))
        content = state.head.replace(b"little", b"big") + swapped.tobytes()
    elif kind == "columns":
        content = content.replace(b"property int label", b"property uint new").replace(
            b"\ncomment made", b"\ncomment MADE"
        )
    source.write_bytes(b"no ply" if kind in ("ascii", "spz") else content)
    (tmp_path / "1").mkdir()
    path = tmp_path / "1" / "edited.ply"
    files.save(edited(before), path)
    if kind == "changed meanwhile":
        source.write_bytes(ply(scene(seed=7)))
    if kind == "gone meanwhile":
        source.unlink()
    push(path, before, record={}, scene=source)
    Stack.open(path).undo()
    assert path.read_bytes() == (content if kind in ("big endian", "columns") else ply(before))


def test_writing_a_result_again_keeps_the_one_before(tmp_path):
    """A run that is taken up again writes the same file a second time: two branches, none lost."""
    source = tmp_path / "scene.ply"
    source.write_bytes(ply(scene()))
    path = run_on(source, tmp_path / "1", "first")
    first = path.read_bytes()
    files.save(edited(scene(), 9, None, "longer"), path)
    push(path, scene(), record={}, scene=source)
    history = Stack.open(path)
    assert history.at == 2 and history.entries[2].parent == 0
    history.goto(1)
    assert path.read_bytes() == first
    # Made of something else altogether: its history begins anew, the records of the old one are put aside.
    files.save(edited(scene(seed=5)), path)
    push(path, scene(seed=5), record={})
    assert list(Stack.open(path).entries) == [1] and (history.own / "aside-1" / "0002.npz").is_file()


def test_a_file_is_found_under_another_name_and_place(file, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    renamed = tmp_path / "elsewhere" / "pig.ply"
    shutil.copy(file, renamed)
    with pytest.raises(InputError, match=r"no history pig.ply.history beside it.*copy the folder"):
        Stack.open(renamed).undo()
    assert os.listdir(renamed.parent) == ["pig.ply"], "nothing was begun"
    shutil.copytree(f"{file}.history", renamed.parent / "edited.ply.history")
    expected = states(file)
    Stack.open(renamed).undo()
    assert renamed.read_bytes() == expected[1]
    assert Stack.open(renamed).own.is_dir() and Stack.open(file).at == 2
    link = tmp_path / "link.ply"
    link.symlink_to(file)
    Stack.open(link).undo()
    assert link.is_symlink() and file.read_bytes() == expected[1]


# -------------------------------------------------------------------------------------------- what can go wrong
def test_a_file_that_another_program_changed_is_left_alone(file):
    mine = file.read_bytes()
    file.write_bytes(mine + b"\n")
    history = Stack.open(file)
    assert history.at is None and history.done == [] and len(history.entries) == 2
    for change in (
        history.undo,
        history.redo,
        lambda: history.strength(0.5),
        lambda: history.goto(1),
        history.gaussians,
    ):
        with pytest.raises(InputError, match=r"edited.ply: changed by another program .* left as it is"):
            change()
    with pytest.raises(InputError, match="changed by another program"):
        history.push(scene())
    assert file.read_bytes() == mine + b"\n"
    file.write_bytes(states_of(file, mine)[1])  # an older copy, put back
    assert Stack.open(file).at == 1
    Stack.open(file).redo()
    assert file.read_bytes() == mine


def states_of(file, content):
    """`states` of a file if it had this content."""
    kept = file.read_bytes()
    file.write_bytes(content)
    found = states(file)
    file.write_bytes(kept)
    return found


def test_a_file_changed_while_it_is_undone_is_left_alone(file, monkeypatch):
    walk = Stack._walk

    def slow(self, *rest):
        state = walk(self, *rest)
        file.write_bytes(b"somebody else was faster")
        return state

    monkeypatch.setattr(Stack, "_walk", slow)
    with pytest.raises(InputError, match="changed by another program just now"):
        Stack.open(file).undo()
    assert file.read_bytes() == b"somebody else was faster"
    assert not list(file.parent.rglob("*.part"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda h: h.undo(3), "asked to undo 3, but 2 can be"),
        (lambda h: h.redo(), "asked to redo 1, but 0 can be"),
        (lambda h: h.goto(7), "no entry 7, only 0, 1, 2"),
        (lambda h: h.strength(1.5), "strength 1.5, expected a number from 0"),
        (lambda h: h.strength(math.nan), "strength nan, expected a number from 0"),
        (lambda h: h.strength(0.5, 7), "7 is not an edit that is done; expected one of 1, 2"),
        (lambda h: h.push(scene(3)), "6 Gaussians became 3; say which row"),
        (lambda h: h.push(scene(3), torch.tensor([0, 1, 6])), "3 whole numbers from -1 to 5"),
        (lambda h: h.push(scene(), record={"loss": math.nan}), "record: .*finite numbers"),
        (lambda h: h.push(scene()._replace(means=torch.full((6, 3), math.inf))), "not finite|finite"),
    ],
)
def test_mistakes_are_told_and_nothing_is_done(file, wrong, said):
    before, listing = file.read_bytes(), sorted(os.listdir(f"{file}.history"))
    with pytest.raises(InputError, match=said):
        wrong(Stack.open(file))
    assert file.read_bytes() == before and sorted(os.listdir(f"{file}.history")) == listing
    assert Stack.open(file).at == 2


def test_damaged_records_are_named_and_nothing_is_done(file):
    before, folder = file.read_bytes(), Path(f"{file}.history")
    record, facts = folder / "0002.npz", folder / "0002.json"
    whole, text = record.read_bytes(), facts.read_text()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 8
    for damage in (whole[:100], b"", bytes(flipped), None):
        record.unlink() if damage is None else record.write_bytes(damage)
        with pytest.raises(InputError, match=r"0002.npz: (damaged|missing)|record is damaged"):
            Stack.open(file).undo()
    record.write_bytes(whole)
    for damage in (
        text[:50],
        "[]",
        text.replace('"format": 1', '"format": 2'),
        text.replace('"parent": 1', '"parent": 5'),
    ):
        facts.write_text(damage)
        with pytest.raises(InputError, match=r"0002.json: |record 2 builds on record 5"):
            Stack.open(file)
    facts.write_text(text)
    (folder / "index.json").write_text("{")  # only a bookmark
    assert file.read_bytes() == before
    Stack.open(file).undo()
    assert [e.number for e in Stack.open(file).undone] == [2]


def child(work):
    """The exit status of a forked process that does `work`: 0 done, 1 an exception (said on stderr), -9 killed."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


RENAMES = [(os, "replace")]
DISK = [*RENAMES, (os, "fsync"), (os, "mkdir"), (np.lib.format, "write_array"), (stack, "write_bookmark")]


def killed_at(count, points):
    """Have this process killed just before its count-th call of one of these functions, from 0."""
    calls = iter(range(count))

    def deadly(function):
        def call(*rest, **more):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*rest, **more)

        return call

    for module, name in points:
        setattr(module, name, deadly(getattr(module, name)))


WORK = {
    "undo": lambda path: Stack.open(path).undo(),
    "strength": lambda path: Stack.open(path).strength(0.5, 1),
    "push": lambda path: Stack.open(path).push(edited(files.load(path), 3)),
}


SLOW = [pytest.param(name, DISK, marks=pytest.mark.slow) for name in WORK]


@pytest.mark.parametrize(("name", "points"), [("strength", RENAMES), *SLOW])
def test_killed_at_any_moment_leaves_the_old_or_the_new_state(file, name, points):
    folder = Path(f"{file}.history")
    reference = file.parent / "reference" / file.name
    reference.parent.mkdir()
    shutil.copy(file, reference)
    shutil.copytree(folder, f"{reference}.history")
    WORK[name](reference)
    old, new = file.read_bytes(), reference.read_bytes()
    assert old != new
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    seen, count = set(), 0

    def work():
        killed_at(count, points)
        WORK[name](file)

    while (status := child(work)) != 0:
        assert status == -signal.SIGKILL
        assert file.read_bytes() in (old, new)
        seen.add(file.read_bytes() == new)
        history = Stack.open(file)
        assert history.at is not None and history.digest(history.at) == history.sha256
        history.goto(1)  # everything still works, and sweeps up
        history.goto(2)
        assert file.read_bytes() == old
        assert not list(file.parent.rglob("*.part"))
        file.write_bytes(old)
        shutil.rmtree(folder)
        folder.mkdir()
        for path, content in kept.items():
            (folder / path).write_bytes(content)
        count += 1
    assert file.read_bytes() == new and seen == {False, True} and count > len(points)


def test_processes_take_turns(file):
    """Two of them undo and redo one file; each step is whole, none is lost."""
    known = states(file)
    pids = []
    for mine in range(2):
        if (pid := os.fork()) == 0:
            try:
                for step in range(6):
                    with_history = Stack.open(file)
                    (with_history.undo if (step + mine) % 2 == 0 and with_history.done else with_history.goto)(
                        *([] if (step + mine) % 2 == 0 and with_history.done else [2])
                    )
                os._exit(0)
            except InputError as error:  # the other one may just have undone the last edit
                os._exit(0 if "asked to undo" in str(error) else 1)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(2)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    history = Stack.open(file)
    assert file.read_bytes() == known[history.at] and set(history.entries) == {1, 2}


def test_a_history_that_is_in_use_is_waited_for_and_then_said(file, monkeypatch):
    monkeypatch.setattr(records, "WAIT", 0.1)
    with records.locked(Path(f"{file}.history")), pytest.raises(InputError, match="another process is changing it"):
        Stack.open(file).undo()
    Stack.open(file).undo()


def test_a_folder_that_cannot_be_written_to(file):
    """For real, as an ordinary user."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        copy = folder / "edited.ply"
        shutil.copy(file, copy)
        shutil.copytree(f"{file}.history", f"{copy}.history")
        for path in (folder, Path(f"{copy}.history")):
            path.chmod(0o555)
        before = copy.read_bytes()

        def work():
            if os.getuid() == 0:
                os.setuid(65534)
            history = Stack.open(copy)
            assert history.at == 2 and history.gaussians(1).n == 6, "reading needs no right to write"
            for change in (history.undo, lambda: history.strength(0.5), lambda: history.push(scene())):
                with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
                    change()

        assert child(work) == 0
        assert copy.read_bytes() == before and len(os.listdir(f"{copy}.history")) == 5
    finally:
        for path in (folder, Path(f"{copy}.history")):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_full_disk_leaves_everything_as_it_was(file, monkeypatch):
    before = file.read_bytes()

    def full(arrays, stream):
        stream.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(deltas, "dump", full)
    with pytest.raises(InputError, match="No space left on device"):
        Stack.open(file).strength(0.5)
    assert file.read_bytes() == before and len(os.listdir(f"{file}.history")) == 5 and Stack.open(file).at == 2


# ------------------------------------------------------------------------------------------------------ the commands
def test_the_commands(file, call):
    known = states(file)
    status, out, _ = call("history", file)
    assert status == 0 and "'prompt 1'" in out and "▸  2" in out and "seed 2" in out and "3 changed" in out
    status, out, err = call("undo", file)
    assert (status, out) == (0, f"{file}\n") and "after edit 1, 'prompt 1'" in err
    assert file.read_bytes() == known[1]
    assert "undone" in call("history", file)[1]
    status, out, err = call("strength", file, "0.5")
    assert (status, out) == (0, f"{file}\n") and "strength 0.5 of edit 1" in err
    assert "has strength 0.5 already" in call("strength", file, 0.5)[2]
    content = json.loads(call("history", file, "--json")[1])
    assert content["at"] == 3 and content["file"] == str(file) and not content["changed_by_another_program"]
    assert [(e["number"], e["place"], e["strength"]) for e in content["entries"]] == [
        (1, "done", 0.5),
        (2, "set aside", None),
        (3, "done", None),
    ]
    assert content["entries"][1]["record"] == {"prompt": "prompt 2", "seed": 2}
    assert "set aside" in call("history", file)[1]
    assert call("redo", file, "--to", 2)[0] == 0 and file.read_bytes() == known[2]
    assert call("undo", file, 2)[0] == 0 and file.read_bytes() == known[0]
    assert "before the first edit" in call("undo", file, "--to", 0)[2]
    assert call("redo", file, 2)[0] == 0 and file.read_bytes() == known[2]


def test_mistakes_at_the_commands(file, call, tmp_path):
    plain = tmp_path / "plain.ply"
    plain.write_bytes(ply(scene(seed=9)))
    assert call("history", plain) == (0, f"{plain}: no edits are recorded.\n", "")
    for words, said in (
        (("undo", plain), "has no history plain.ply.history"),
        (("undo", file, 9), "asked to undo 9, but 2 can be undone"),
        (("undo", file, 1, "--to", 1), "give N or --to K"),
        (("undo", file, "--to", 9), "edit 9 is not done"),
        (("redo", file, "--to", 9), "no entry 9"),
        (("strength", file, "2"), "2.0 is not in the range"),
        (("strength", file, "1", "--edit", 5), "5 is not an edit that is done"),
        (("history", tmp_path / "none.ply"), "no such file"),
    ):
        status, out, err = call(*words)
        assert (status, out) == (2, "") and said in err and err.count("\n") == 1, words
    file.write_bytes(b"other")
    status, out, err = call("history", file)
    assert status == 0 and "changed by another program" in err and "prompt 1" in out


def test_the_python_of_the_guide(file, monkeypatch, capsys):
    guide = (Path(__file__).parent.parent / "docs" / "history.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)
    monkeypatch.chdir(file.parent)
    exec(compile(code, "history.md", "exec"), {})
    assert capsys.readouterr().out == "[\"'prompt 1'\", \"'prompt 2'\"]\n"
    assert Stack.open(file).done[-1].title == "'a negative'" and len(Stack.open(file).entries) == 4
