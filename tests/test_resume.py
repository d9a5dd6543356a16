"""Edits that go on where they were cut off: in the loop, from checkpoints, from the command line, after kill -9."""

import pytest
import torch
from test_editing import ToyPrior, painted

from splatedit.cameras import dome
from splatedit.editing import edit
from splatedit.errors import InputError
from splatedit.guidance import GUIDANCE
from splatedit.render import render
from splatedit.source_cache import SERVED


@pytest.fixture
def red(cloud):
    return painted(cloud, (0.8, 0.1, 0.1))


@pytest.fixture
def pictures(cloud, red):
    cameras = dome(red, 5, size=32)
    return {"red": render(red, cameras).rgb, "blue": render(painted(cloud, (0.1, 0.1, 0.8)), cameras).rgb}


def saved(state, folder):
    """What comes back from a file."""
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def same(first, second):
    return all(torch.equal(a, second.parameters[k]) for k, a in first.parameters.items())


# ------------------------------------------------------------------------------------------------------------ the loop
@pytest.mark.parametrize(("guidance", "cache"), [*((g, 0) for g in GUIDANCE), *((g, 2) for g in SERVED)])
def test_two_parts_of_an_edit_are_the_whole_bit_for_bit(guidance, cache, red, pictures, tmp_path):
    """Cut before the first average and after some; 5 views in 6 steps of 2, so that the order goes around."""
    options = {"guidance": guidance, "steps": 6, "views": 5, "supersample": 1, "average_last": 0.5}
    options |= {"source_cache": cache, "cache_refresh": 2 if cache else 0, "timesteps": "stratified"}

    def run(**more):
        return edit(red, "blue", model=ToyPrior(pictures), **options, **more)

    whole, states = [], {}
    for step in run():
        whole.append(step)
        states[step.index + 1] = saved(step.state(), tmp_path)
    for cut in (1, 4):
        rest = list(run(resume=states[cut]))
        assert [s.index for s in rest] == list(range(cut, 6))
        for one, other in zip(whole[cut:], rest, strict=True):
            assert one.loss == other.loss and torch.equal(one.image, other.image)
            assert same(one.gaussians, other.gaussians)
        if not cache:  # records that were in memory are made again, which is counted
            assert [(s.evaluations, s.backwards) for s in whole[cut:]] == [(s.evaluations, s.backwards) for s in rest]
        end, again = states[6], rest[-1].state()
        assert torch.equal(end["generator"], again["generator"]) and end["averaged"] == again["averaged"] == 3
        assert end.get("source_cache_visits") == again.get("source_cache_visits")


def test_an_edit_at_its_end_has_nothing_more_to_do_and_a_longer_one_goes_on(red, pictures):
    options = {"guidance": "dds", "views": 5, "supersample": 1, "model": ToyPrior(pictures)}
    last = list(edit(red, "blue", "red", steps=4, average_last=0.5, **options))[-1]
    assert list(edit(red, "blue", "red", steps=4, **options, resume=last.state())) == []
    longer = edit(red, "blue", "red", steps=12, average_last=0.5, **options, resume=last.state())
    averaged = [(step.index, step.state()["averaged"]) for step in longer]
    assert averaged == [(4, 0), (5, 0), *((index, index - 5) for index in range(6, 12))], "of the longer edit alone"


def test_a_state_of_another_edit_is_refused(red, pictures, cloud):
    def run(gaussians=red, **more):
        return list(edit(gaussians, "blue", "red", model=ToyPrior(pictures), views=5, **{"steps": 2, **more}))

    state = run(guidance="ids")[-1].state()
    with pytest.raises(InputError, match="resume: the state is of 2 steps, but steps is 1"):
        run(steps=1, resume=state)
    with pytest.raises(InputError, match="resume: the state is of a scene"):
        run(cloud, resume=state)
    for more in ({"guidance": "vsd"}, {"source_cache": 1}):
        with pytest.raises(InputError, match="resume: the state is of another guidance or source_cache"):
            run(**more, resume=state)
