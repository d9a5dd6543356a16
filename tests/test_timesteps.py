"""Which noise levels an edit goes through."""

import pytest
import torch

from splatedit.config import TIMESTEPS as NAMES
from splatedit.diffusion import sample_draw, scaled_linear, scales
from splatedit.errors import InputError
from splatedit.timesteps import PARTS, TIMESTEPS, Progress, annealed, edit_draw, stratified, uniform


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["uniform", "stratified"])
def test_every_step_of_the_range_is_equally_likely(name):
    generator, at = seeded(), Progress(50, 69)
    counts = torch.bincount(
        torch.cat([TIMESTEPS[name](50, at._replace(drawn=i), generator) for i in range(0, 20000, 50)]) - 50
    )
    assert len(counts) == 20
    spread = (20000 * 0.05 * 0.95) ** 0.5
    assert ((counts - 1000).abs() < 4 * spread).all()


def test_stratified_draws_visit_every_part_once_in_a_round():
    generator, at = seeded(), Progress(100, 899)
    t = torch.cat([stratified(2, at._replace(drawn=i), generator) for i in range(0, 3 * PARTS, 2)])
    parts = (t - 100) * PARTS // 800
    assert [sorted(chunk.tolist()) for chunk in parts.split(PARTS)] == [list(range(PARTS))] * 3
    assert (parts[::2] < PARTS / 2).all() and (parts[1::2] >= PARTS / 2).all(), "neighbours lie far apart"


def test_annealed_falls_in_a_straight_line_and_asks_no_generator():
    generator = seeded()
    state = generator.get_state()
    t = [annealed(2, Progress(200, 900, done), generator).tolist() for done in (0, 0.25, 0.5, 1)]
    assert t == [[900, 900], [725, 725], [550, 550], [200, 200]]
    assert torch.equal(state, generator.get_state())


def test_a_range_of_one_step_is_that_step():
    for draw in (uniform, stratified, annealed):
        assert draw(3, Progress(7, 7), seeded()).tolist() == [7, 7, 7]


def test_an_edit_s_draw_is_the_plain_one_until_it_is_annealed():
    z, table = torch.zeros(64, 1, 2, 2), scaled_linear()
    plain, found = sample_draw(table, z, (0.1, 0.9), seeded()), edit_draw("uniform", table, z, (0.1, 0.9), seeded())
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    late = edit_draw("uniform", table, z, (0.1, 0.9), seeded(), done=1.0, anneal=0.75)
    assert 100 <= late.t.min() and 250 < late.t.max() <= 300
    falling = edit_draw("annealed", table, z, (0.1, 0.9), seeded(), done=1.0, anneal=0.75)
    assert (falling.t == 100).all()
    assert torch.equal(falling.a, scales(table, falling.t, z)[0]) and falling.noise.shape == z.shape


@pytest.mark.parametrize("t_range", [(-0.1, 0.5), (0.5, 1.5), (0.9, 0.1), (float("nan"), 0.5)])
def test_a_range_outside_the_schedule_is_an_error(t_range):
    with pytest.raises(InputError, match="t_range: found .* 0 <= low <= high <= 1"):
        sample_draw(scaled_linear(), torch.zeros(1, 1, 1, 1), t_range, seeded())


def test_steps_at_which_nothing_is_left_are_not_drawn_whatever_the_way():
    table = scaled_linear()
    table[990:] = 0
    for name in TIMESTEPS:
        draw = edit_draw(name, table, torch.zeros(256, 1, 1, 1), (0.98, 1.0), seeded())
        assert draw.t.max() <= 989 and draw.a.min() > 0


def test_names_are_those_of_the_settings():
    assert tuple(NAMES) == tuple(TIMESTEPS)
    with pytest.raises(InputError, match="timesteps: 'cosine' is not known; choose one of uniform, stratified, anneal"):
        edit_draw("cosine", scaled_linear(), torch.zeros(1, 1, 1, 1), (0, 1), seeded())
