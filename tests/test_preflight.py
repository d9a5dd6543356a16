import json

import pytest
import torch

from splatedit import preflight
from splatedit.config import GUIDANCES, load_config
from splatedit.run import run


@pytest.fixture
def words(scene_file, tiny_model, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr("splatedit.work.FRAMES", 2)
    monkeypatch.setattr("splatedit.work.VIEWS", 2)
    monkeypatch.chdir(tmp_path)
    given = ["run", scene_file, "a pig", "--source-prompt", "a cat", "--model", tiny_model, "--cameras", "orbit:3"]
    return [*given, "--steps", "9", "-o", "out", "supersample=1"]


def test_the_plan_is_a_short_table_and_nothing_is_written(call, words, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(*words, "--dry-run", "--mask-rule", "red > 0.5", "cache_dir=run", "--source-cache", 1)
    assert status == 0 and sorted(tmp_path.rglob("*")) == before
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line[0] != " ")
    assert list(rows) == [
        *("scene", "cameras", "prompts", "model", "guidance", "evaluations", "time", "memory", "checkpoints", "output")
    ]
    assert "300 splats, SH degree 1" in rows["scene"] and "may change" in rows["scene"]
    assert rows["cameras"] == "orbit: 3 views, 0 held out, 2 in each step"
    assert rows["prompts"] == "from 'a cat' (option) to 'a pig'"
    assert rows["guidance"] == "ids, scale 3, solver grad, 9 steps"
    assert rows["output"].startswith("out/ball/a-pig@") and "(not made)" in rows["output"]
    assert rows["time"].startswith("about ") and "(3 timed, " in rows["time"]
    assert "Warning" not in err


@pytest.mark.parametrize(
    ("more", "exact"),
    [
        *(
            pytest.param([f"guidance={name}"], name != "sdi", marks=pytest.mark.slow)
            for name in GUIDANCES
            if name != "ids"
        ),
        (["fpr_iters=2"], True),
        pytest.param(["guidance=dds", "source_cache=2"], False, marks=pytest.mark.slow),
    ],
)
def test_what_is_counted_and_computed_is_what_the_run_takes(words, call, more, exact):
    status, out, _ = call(*words, *more, "--dry-run", "--json")
    assert status == 0
    found = json.loads(out)
    config = load_config(None, {"scene": str(words[1]), "prompt": "a pig", "model": str(words[6])}, ())
    config = load_config(
        None, {"source_prompt": "a cat"}, ["cameras=orbit:3", "steps=9", "supersample=1", *more], config
    )
    done = run(config)
    rows = done.record["network_evaluations"]
    if exact:
        assert (found["evaluations"]["all"], found["evaluations"]["backward"]) == (rows["edit"], rows["backward"])
    elif "guidance=sdi" in more:
        assert rows["edit"] < found["evaluations"]["all"] < 2 * rows["edit"] and found["evaluations"]["at_most"]
    else:
        assert found["evaluations"]["all"] == pytest.approx(rows["edit"], rel=0.1), "but for chance"
    saved = torch.load(done.folder / "ckpts" / "last.pt", weights_only=True)
    moments = [v for state in saved["optimizer"]["state"].values() for k, v in state.items() if k.startswith("exp_avg")]
    held = {"adam_moments": moments, "splats": list(saved["parameters"].values())}
    for name, tensors in held.items():
        bytes_ = sum(t.numel() * t.element_size() for t in tensors)
        assert found["memory_mib"]["parts"][name] * 2**20 == pytest.approx(bytes_, rel=1e-4), name
    assert found["output"]["edited_ply"] * 2**20 == pytest.approx((done.edited).stat().st_size, rel=0.1)
    size = (done.folder / "ckpts" / "last.pt").stat().st_size
    assert 0 < size - found["output"]["checkpoint"] * 2**20 < 120_000, "settings, losses and names are not in it"


def test_times_are_those_of_the_steps_alone(words, call, monkeypatch):
    """With a clock that stands still but in the steps."""
    now = [0.0]
    monkeypatch.setattr("splatedit.preflight.time.perf_counter", lambda: now[0])
    plain = preflight.edit

    def slow(*args, **more):
        for step in plain(*args, **more):
            now[0] += 5.0 if step.index == 0 else 2.0  # the first holds the source: 5 s less its own
            yield step._replace(seconds={"render": 0.5, "prior": 1.5, "encode": 0.0, "optimise": 0.0})

    monkeypatch.setattr(preflight, "edit", slow)
    seconds = json.loads(call(*words, "--dry-run", "--json", "guidance=dds")[1])["seconds"]
    assert seconds["source"] == 3.0 and seconds["timed_steps"] == [2.0, 2.0, 2.0]
    assert seconds["steps"] == pytest.approx(18.0) and seconds["a_step"] == pytest.approx(2.0)
    assert seconds["all"] == pytest.approx(18 + 3 + seconds["report"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--json"], "--json goes with --dry-run"),
        (["--dry-run", "--resume"], "plans a new run"),
        (["--dry-run", "stepz=3"], "'steps'"),
        (["--dry-run", "--mask-box", "99,99,99,1,1,1"], "none of the 300 splats"),
        (["--dry-run", "-o", "taken/x"], "output_dir: taken/x cannot be written to"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(call, words, tmp_path, more, message):
    (tmp_path / "taken").write_text("")
    status, out, err = call(*words, *more)
    assert (status, out) == (2, "") and message in err.splitlines()[-1]


def test_no_room_for_the_first_steps_says_what_to_do(call, words, monkeypatch):
    def fails(*args, **more):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(preflight, "edit", fails)
    status, out, err = call(*words, "--dry-run")
    assert (status, out) == (1, "") and "out of memory in the first steps" in err and "try a smaller --vram" in err


def test_what_speaks_against_a_run_is_said():
    memory = {"all": 9000.0, "available": 8500.0}
    output = {"edited_ply": 10.0, "history": 10.0, "checkpoint": 10.0, "free": 40.0}
    plan = {"memory_mib": memory, "output": output, "seconds": {"all": 3.0}}
    assert preflight.warnings(plan) == ["it may not fit into the memory there is; try --vram 8."]
    memory["available"], output["free"] = None, 20.0
    assert preflight.warnings(plan) == ["the results take about 30 MiB, but only 20 MiB are free there."]


def test_words_for_sizes_and_times():
    assert [preflight.size(v) for v in (0.25, 12.4, 999.0, 2048.0)] == ["0.2 MiB", "12 MiB", "999 MiB", "2.0 GiB"]
    times = [preflight.duration(v) for v in (1.25, 42.0, 130.0, 3600.0, 11100.0)]
    assert times == ["1.2 s", "42 s", "2 min 10 s", "1 h 0 min", "3 h 5 min"]
