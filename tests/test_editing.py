"""The loop, on a prior whose answers are exact: a mixture of two pictures, a red ball and a blue one."""

import math

import pytest
import torch
import torch.nn.functional as F
from mixtures import OneGaussian, Seen

from splatedit.camera_files import save_cameras
from splatedit.cameras import dome, orbit
from splatedit.diffusion import MixtureDenoiser
from splatedit.editing import drift, edit, rig_for, view_order
from splatedit.errors import InputError, Lost
from splatedit.fpr import SOLVERS
from splatedit.gaussians import SH_C0
from splatedit.guidance import GUIDANCE
from splatedit.metrics import change_report
from splatedit.priors import Prior
from splatedit.render import render
from splatedit.scenes import Rates
from splatedit.source_cache import SERVED
from splatedit.tuning import Tuning


class ToyPrior(Prior):
    """Latents are 4x4 block means of the picture in [-1, 1]; the prompts are "red" and "blue"."""

    def __init__(self, pictures: dict[str, torch.Tensor]):
        self.name, self.image_size, self.latent_channels = "toy", 32, 3
        self.device, self.dtype, self.evaluations = torch.device("cpu"), torch.float32, 0
        self.names = list(pictures)
        self.vocabulary = tuple(self.names)
        means = torch.stack([self.encode(p).mean(0) for p in pictures.values()])
        self.mixture = MixtureDenoiser(means, floor=0.02)
        self.network = Seen(self.mixture)
        self.self_attention = self.network.self_attention
        self.particle = lambda *_: OneGaussian(self.mixture.alphas_cumprod, 0.02)
        self.alphas_cumprod = self.mixture.alphas_cumprod.float()
        self.calls = 0

    def encode(self, images):
        return F.avg_pool2d(images * 2 - 1, 8)

    def text(self, prompts):
        weights = [[float(n == p) + 1e-9 for n in self.names] if p else [1.0] * len(self.names) for p in prompts]
        return self.mixture.text(weights[0])._replace(embeds=torch.cat([self.mixture.text(w).embeds for w in weights]))

    def null(self, b=1):
        return self.text([""] * b)

    def denoise(self, x, t, text):
        self.evaluations += len(x)
        self.calls += 1
        return self.network(x, t, text)

    def default_scale(self, guidance):
        return 2.0

    def save_memory(self, savings):
        """There are no networks to save it in."""


def painted(cloud, color):
    sh0 = (torch.tensor(color).expand(cloud.n, 3) - 0.5) / SH_C0
    return cloud._replace(sh0=sh0[:, None].clone(), shN=torch.zeros(cloud.n, 0, 3))


@pytest.fixture
def red(cloud):
    return painted(cloud, (0.8, 0.1, 0.1))


@pytest.fixture
def prior(cloud, red):
    cameras = dome(red, 8, size=32)
    return ToyPrior({"red": render(red, cameras).rgb, "blue": render(painted(cloud, (0.1, 0.1, 0.8)), cameras).rgb})


def run(red, prior, **options):
    settings = {"steps": 6, "views": 8, "guidance": "dds", "supersample": 1, **options}
    return list(edit(red, "blue", "red", model=prior, **settings))


def color(gaussians):
    return gaussians.sh0.mean((0, 1)) * SH_C0 + 0.5


@pytest.mark.parametrize("guidance", list(GUIDANCE))
def test_every_guidance_turns_the_ball_towards_blue(red, prior, guidance):
    steps = run(red, prior, guidance=guidance, steps=40, rates=Rates(sh0=0.05))
    before, after = color(red), color(steps[-1].gaussians)
    assert after[0] < before[0] - 0.05 and after[2] > before[2] + 0.05


def test_the_same_seed_gives_the_same_splats_bit_for_bit_and_another_does_not(red, prior):
    first, again, other = (run(red, prior, guidance="ids", seed=s)[-1].gaussians for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters.values(), again.parameters.values(), strict=True))
    assert not torch.equal(first.sh0, other.sh0)


def test_steps_report_what_happened(red, prior):
    steps = run(red, prior, guidance="ids", steps=3, views_per_step=2, fpr_iters=2)
    assert [s.index for s in steps] == [0, 1, 2] and steps[0].steps == 3
    last = steps[-1]
    assert last.image.shape == (2, 3, 32, 32) and not last.image.requires_grad
    assert set(last.seconds) == {"render", "encode", "prior", "optimise"} and min(last.seconds.values()) > 0
    # A step is 2 FPR calls of null + source and one call of null + target + source, for 2 views.
    assert last.evaluations == 3 * 2 * (2 * 2 + 4) and prior.calls == 3 * 3
    assert len(last.residuals) == 3 and steps[0].psnr_to_source == float("inf")
    assert last.psnr_to_source < 60


def test_a_step_s_state_is_what_the_optimiser_holds(red, prior):
    last = run(red, prior, steps=4, average_last=0.5)[-1]
    state = last.state()
    assert state["step"] == 4 and state["averaged"] == 2
    assert torch.equal(state["mean"]["sh0"], last.gaussians.sh0)
    assert not torch.equal(state["parameters"]["sh0"], red.sh0)
    assert all(int(moments["step"]) == 4 for moments in state["optimizer"]["state"].values())


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_turns_the_ball_towards_blue_and_says_what_it_did(solver, red, prior):
    steps = run(red, prior, guidance="ids", solver=solver, fpr_iters=2, steps=40, rates=Rates(sh0=0.05))
    before, after = color(red), color(steps[-1].gaussians)
    assert after[0] < before[0] - 0.05 and after[2] > before[2] + 0.05
    assert len(steps[0].residuals) == 3 and steps[0].fpr.rms.shape == (3, 2)
    assert steps[-1].evaluations == sum(s.fpr.evaluations for s in steps) == prior.evaluations
    assert steps[-1].backwards == sum(s.fpr.backwards for s in steps)
    assert (steps[-1].backwards > 0) == (solver.startswith("grad") or solver == "by_level")


def test_outside_the_range_of_fpr_an_edit_is_one_of_dds(red, prior):
    tuning = Tuning(fpr_t_range=(0.99, 1.0))
    ids, dds = (run(red, prior, guidance=g, tuning=tuning, steps=3)[-1].gaussians for g in ("ids", "dds"))
    assert torch.equal(ids.sh0, dds.sh0)
    other = run(red, prior, guidance="ids", tuning=Tuning(fpr_t_range=(0.01, 1.0)), steps=3)[-1].gaussians
    assert not torch.equal(other.sh0, dds.sh0)


@pytest.mark.parametrize(("guidance", "rows"), [("sds", 2), ("dds", 4)])
def test_null_source_and_target_go_through_the_network_as_one_batch(red, prior, guidance, rows):
    run(red, prior, guidance=guidance, steps=2, views_per_step=3)
    assert prior.calls == 2 and prior.evaluations == 2 * 3 * rows


def test_asking_for_the_source_pulls_nowhere_at_the_start(red, prior):
    step = next(edit(red, "red", "red", model=prior, guidance="dds", steps=1, views=8, supersample=1))
    assert step.loss < 1e-6


def test_the_source_is_found_when_it_is_not_said(red, prior, monkeypatch):
    from splatedit import priors

    asked, find = [], priors.find_prompt

    def spy(*words):
        asked.append(find(*words))
        return asked[-1]

    monkeypatch.setattr(priors, "find_prompt", spy)
    step = next(edit(red, "blue", model=prior, guidance="dds", steps=1, views=8, supersample=1))
    assert [prompt for prompt, _ in asked] == ["red"] and step.loss > 0


def test_the_report_says_changed_and_the_prior_prefers_the_target(red, prior):
    colors_only = Rates(means=0, quats=0, scales=0, opacities=0, sh0=0.1)
    edited = run(red, prior, steps=120, rates=colors_only)[-1].gaussians
    cameras = orbit(red, 6, size=32)
    report = change_report(red, edited, prior, cameras, "blue", "red", 1.0)
    assert report.verdict == "changed" and report.changed_share > 0.9
    assert report.prefers_target == 1.0 and report.preferred_target_before == 0.0 and report.margin > 0
    same = change_report(red, red, prior, cameras, "blue", "red", 1.0)
    assert same.verdict == "unchanged" and same.changed_share == 0 and same.advice


def test_a_splat_blown_to_bits_is_called_noise(red, prior):
    rng = torch.Generator().manual_seed(0)
    confetti = red._replace(sh0=red.sh0 + 6 * torch.randn(red.sh0.shape, generator=rng))
    report = change_report(red, confetti, prior, orbit(red, 4, size=32), "blue", "red", 1.0)
    assert report.verdict == "noise" and any("guidance" in a for a in report.advice)


def test_an_edit_whose_splats_burst_says_when(red, prior, monkeypatch):
    def burst(scene, *_):
        scene.parameters["scales"].data[:7] = 100.0  # e^100 is no float32

    monkeypatch.setattr("splatedit.scenes.Splats.step", burst)
    steps = []
    with pytest.raises(Lost, match=rf"after 1 steps 7 of {red.n} splats are no longer finite; lower the rates"):
        steps.extend(edit(red, "blue", "red", model=prior, steps=5, views=4))
    assert len(steps) == 1 and (~steps[0].gaussians.drawable()).sum() == 7


def test_mistakes_are_named(red, prior):
    with pytest.raises(InputError, match="guidance: 'idz'"):
        run(red, prior, guidance="idz")
    with pytest.raises(InputError, match="solver: 'picar' is not known; choose one of grad"):
        run(red, prior, solver="picar")
    with pytest.raises(InputError, match="fpr_t_range: found .*low <= high"):
        run(red, prior, guidance="ids", tuning=Tuning(fpr_t_range=(0.5, 0.2)))
    with pytest.raises(InputError, match="fpr lambda: found -1"):
        run(red, prior, guidance="ids", fpr_lambda=-1)
    broken = red._replace(means=red.means.index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(InputError, match=r"scene: means, row 3, component 0: found nan, expected a finite number"):
        next(edit(broken, "a pig", "a cat", model=prior))
    with pytest.raises(InputError, match="not a rig"):
        run(red, prior, cameras="sphere")
    with pytest.raises(InputError, match="64x64"):
        run(red, prior, cameras=orbit(red, 3, size=64))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA GPU"):
            next(edit(red, "a cat", device="cuda"))


def test_cameras_that_see_nothing_are_an_error(red, prior):
    away = orbit(red, 3, size=32)
    turned = away.w2c.clone()
    turned[:, 2, 3] = -100  # everything is behind
    with pytest.raises(InputError, match="none of them sees"):
        run(red, prior, cameras=away._replace(w2c=turned))


def test_every_view_has_its_turn_before_any_comes_back():
    order = view_order(5, 12, torch.Generator().manual_seed(0))
    assert sorted(order[:5].tolist()) == sorted(order[5:10].tolist()) == [0, 1, 2, 3, 4] and len(order) == 12


def test_rig_by_name_has_the_prior_s_picture_size(red):
    rig = rig_for(red, "orbit", 5, 48, "+y")
    assert (rig.n, rig.width, rig.height) == (5, 48, 48)


def test_cameras_of_a_file_have_the_prior_s_picture_size_too(red, tmp_path):
    cameras = orbit(red, 12, size=(64, 48))
    save_cameras(cameras, tmp_path / "transforms.json")
    rig = rig_for(red, str(tmp_path), 5, 48, "+y")
    assert (rig.n, rig.width, rig.height) == (5, 48, 48)
    torch.testing.assert_close(rig.w2c[0], cameras.w2c[1], atol=2e-6, rtol=0)  # the first is held out
    with pytest.raises(InputError, match="'dom': no such file, and not a rig; choose orbit, dome, dome:48 or a file"):
        rig_for(red, "dom", 5, 48, None)


def test_drift_is_relative_to_the_latents():
    z = torch.full((2, 1, 2, 2), 3.0)  # norm 6
    assert drift(torch.tensor([[6.0, 3.0], [3.0, 0.0]]), z) == pytest.approx([0.75, 0.25])
    assert drift(torch.tensor([[6.0, math.nan]]), z) == pytest.approx([1.0]), "a view that was not refined"


# -------------------------------------------------------------------------------------------------------- source cache
def test_a_cached_edit_reaches_the_target_for_one_evaluation_of_the_edit(red, prior):
    steps = run(red, prior, guidance="ids", source_cache=2, steps=40, rates=Rates(sh0=0.05))
    before, after = color(red), color(steps[-1].gaussians)
    assert after[0] < before[0] - 0.05 and after[2] > before[2] + 0.05
    spent = [steps[0].evaluations, *(b.evaluations - a.evaluations for a, b in zip(steps, steps[1:], strict=False))]
    filled = steps[-1].cache["filled"]
    # A record is three guided calls for the noise and one for the score; a step, one for each of two views.
    assert sum(spent) == 40 * 2 * 2 + filled * 8 and filled <= 8 * 2 and spent[-1] == 4
    assert steps[-1].backwards == filled * 6 and steps[-1].cache["hits"] == 80 - filled
    assert len(steps[-1].residuals) == 1


@pytest.mark.parametrize("guidance", SERVED)
def test_forgetting_or_finding_records_changes_no_edit(guidance, red, prior, tmp_path):
    options = {"guidance": guidance, "source_cache": 2, "cache_refresh": 2, "steps": 6, "views": 4}
    whole, poor, cold, warm = (
        run(red, prior, **options, **more)[-1]
        for more in ({}, {"cache_mb": 0}, {"cache_dir": str(tmp_path)}, {"cache_dir": str(tmp_path)})
    )
    for other in (poor, cold, warm):
        assert torch.equal(whole.gaussians.sh0, other.gaussians.sh0)
    assert poor.cache["hits"] == 0 < whole.cache["hits"] and warm.cache["filled"] == 0 == cold.cache["read"]
    assert not torch.equal(whole.gaussians.sh0, run(red, prior, **{**options, "source_cache": 0})[-1].gaussians.sh0)


def test_records_serve_another_target_but_no_other_source_seed_scale_or_solver(red, prior, tmp_path):
    options = {"guidance": "ids", "source_cache": 1, "cache_dir": str(tmp_path), "steps": 2, "views": 2}
    run(red, prior, **options)

    def read(prompt="blue", source="red", **more):
        step = list(edit(red, prompt, source, model=prior, supersample=1, **{**options, **more}))[-1]
        return step.cache["read"]

    assert read() == read(prompt="red") == read(steps=4) == 2
    others = ({"source": "blue"}, {"seed": 1}, {"guidance_scale": 3.0}, {"solver": "picard"}, {"fpr_iters": 1})
    assert [read(**other) for other in others] == [0] * 5
    assert read(guidance="dds") == 0 and read(guidance="pds") == 2, "unrefined noise serves both"


def test_a_checkpoint_knows_how_often_records_were_used(red, prior, tmp_path):
    last = run(red, prior, guidance="ids", source_cache=1, steps=8, views=4)[-1]
    torch.save(last.state(), tmp_path / "a.pt")
    visits = torch.load(tmp_path / "a.pt", weights_only=True)["source_cache_visits"]
    assert visits == {(view, 0): 4 for view in range(4)}


def test_a_guidance_without_a_source_side_has_no_use_for_a_cache(red, prior):
    for guidance in set(GUIDANCE) - set(SERVED):
        with pytest.raises(InputError, match=f"source_cache: {guidance} cannot use one; choose 0, or one of ids"):
            run(red, prior, guidance=guidance, source_cache=1)
