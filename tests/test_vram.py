import json
import random
from dataclasses import asdict, fields

import pytest
import tiny_models as tiny
import torch

from splatedit import vram
from splatedit.cli import load_config
from splatedit.config import Config, check
from splatedit.distilling import Distiller, Method
from splatedit.errors import InputError, OutOfMemory
from splatedit.priors import Prior, Savings
from splatedit.run import run
from splatedit.vram import MEMORY, VRAM, Smaller, cap, leaner, step_down

ALL = Savings(checkpointing=True, attention_slicing=True, vae_slicing=True, rows_at_once=1)
EACH = [Savings(**{k: True}) for k in ("checkpointing", "attention_slicing", "vae_slicing")] + [Savings(rows_at_once=3)]


# ------------------------------------------------------------------------------------------------------------ settings
def test_presets_are_settings_and_each_is_leaner_than_the_one_above():
    names = {f.name for f in fields(Config)}
    assert set(MEMORY) <= names and set(Savings._fields) <= set(MEMORY)
    plain = asdict(Config())
    for big, small in ((24, 16), (16, 12), (12, 8)):
        assert set(VRAM[big]) <= set(VRAM[small]) <= set(MEMORY)
        above = {**plain, "grow_percent": 1.0, **VRAM[big]}
        below = {**plain, "grow_percent": 1.0, **VRAM[small]}
        assert leaner(above, small) and not leaner(below, big), "nothing is larger in the smaller one"
    for gigabytes in VRAM:
        check(Config(**{"vram": gigabytes, **VRAM[gigabytes]}))


def test_a_preset_is_a_layer_under_what_is_given_beside_it(tmp_path):
    assert load_config(options={"vram": 8}).views_per_step == 1
    assert load_config(options={"vram": 8}, words=["views_per_step=3"]).views_per_step == 3
    assert load_config(words=["views_per_step=3", "vram=8"]).views_per_step == 3
    assert load_config(words=["vram=8", "vram=null"]) == Config()
    (tmp_path / "c.yaml").write_text("vram: 8\nviews_per_step: 2\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.views_per_step, config.supersample, config.rows_at_once) == (2, 1, 2), "the file's own words win"
    assert load_config(tmp_path / "c.yaml", {"vram": 12}).rows_at_once == 4
    assert load_config(tmp_path / "c.yaml", {"vram": 8}).views_per_step == 1, "what comes later wins"
    for word in ("vram=10", "vram=0"):
        with pytest.raises(InputError, match="8, 12, 16, 24"):
            load_config(words=[word])


def test_the_step_down_is_the_largest_that_fits_and_changes_something():
    plain = asdict(Config())
    assert step_down(plain, None) == Smaller(24, {"vram": 24, "vae_slicing": True, "rows_at_once": 16})
    assert step_down(plain, 11.7).vram == 12 and step_down(plain, 5.0).vram == 8
    assert step_down({**plain, "vram": 24, **VRAM[24]}, 80.0).changes == {
        "vram": 16,
        "checkpointing": True,
        "rows_at_once": 8,
    }
    lean = {**plain, **VRAM[8]}
    assert step_down(lean, 80.0) is None and step_down({**lean, "vram": 8}, None) is None
    own = {**plain, "vram": 16, **VRAM[16], "rows_at_once": 1, "supersample": 4}
    assert step_down(own, None) == Smaller(12, {"vram": 12, "supersample": 1}), "never up again"
    growing = {**plain, "grow_percent": 5.0}
    assert "max_gaussians" in step_down(growing, 8.0).changes and "max_gaussians" not in step_down(plain, 8.0).changes


def test_a_preset_never_asks_for_fewer_splats_than_there_are():
    preset = {"vram": 8, **VRAM[8]}
    assert cap(preset, 10) == 1_000_000 and cap(preset, 5_000_000) == 5_000_000
    assert cap({**preset, "max_gaussians": 7}, 10) == 7, "the user's own number is checked as ever"
    assert cap(asdict(Config()), 10) is None


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, answer):
    assert vram.out_of_memory(error) is answer


# ---------------------------------------------------------------------------------------------------------- the models
def pipelines():
    return {"sd": tiny.sd, "sdxl": tiny.sdxl, "tiny": lambda: tiny.sd(vae=tiny.autoencoder("tiny"))}


def pull(prior: Prior, guidance: str = "ids") -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient that two pictures get, on their latents and on their pixels."""
    pixels = torch.rand(2, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = prior.encode(pixels)
    generator = torch.Generator().manual_seed(1)
    source = prior.encode(torch.rand(4, 3, tiny.SIDE, tiny.SIDE, generator=generator))
    distiller = Distiller(prior, Method(guidance, 5.0), "a pig", "a cat", source, generator)
    gradient = distiller(z.detach(), [2, 0]).gradient
    return gradient, torch.autograd.grad(z, pixels, gradient)[0]


@pytest.mark.parametrize(
    ("kind", "several"),
    [("sd", [ALL]), ("tiny", [ALL]), *(pytest.param(k, EACH, marks=pytest.mark.slow) for k in ("sd", "sdxl", "tiny"))],
)
def test_savings_change_no_number_but_for_rounding(kind, several, one_thread):
    prior = Prior(pipelines()[kind]())
    expected, rows = pull(prior), prior.evaluations
    for savings in several:
        prior.save_memory(savings)
        before = prior.evaluations
        for found, wanted in zip(pull(prior), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        assert prior.evaluations - before == rows, "the same rows, in more calls"
    prior.save_memory(Savings())
    assert all(torch.equal(*pair) for pair in zip(pull(prior), expected, strict=True)), "and off again"


def test_who_reads_attention_reads_all_rows_in_one_call(one_thread):
    prior = Prior(tiny.sd())
    expected = pull(prior, "cds")
    prior.save_memory(ALL)
    for found, wanted in zip(pull(prior, "cds"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert prior.rows_at_once == 1


def test_checkpointing_keeps_less_for_the_gradient_in_both_networks():
    prior, kept = Prior(tiny.sd()), []
    for savings in (Savings(), Savings(checkpointing=True)):
        prior.save_memory(savings)
        sizes: dict[str, int] = {"vae": 0, "unet": 0}
        pixels = torch.rand(2, 3, tiny.SIDE, tiny.SIDE).requires_grad_()
        x = torch.randn(2, 4, tiny.SIDE // 2, tiny.SIDE // 2).requires_grad_()

        def count(name):
            def keep(tensor):
                sizes[name] += tensor.numel()  # noqa: B023
                return tensor

            return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

        with count("vae"):
            prior.encode(pixels)
        with count("unet"):
            prior.denoise(x, torch.tensor([300, 700]), prior.text(["a cat", "a pig"]))
        kept.append(sizes)
    assert kept[1]["vae"] < kept[0]["vae"] / 2 and kept[1]["unet"] < kept[0]["unet"] / 2


def test_tiling_reaches_the_autoencoder():
    prior = Prior(tiny.sd())
    prior.save_memory(Savings(vae_tiling=True))
    assert prior.vae.use_tiling
    large = torch.rand(1, 3, 2 * tiny.SIDE, 2 * tiny.SIDE)
    assert prior.encode(large).shape == (1, 4, tiny.SIDE, tiny.SIDE)
    prior.save_memory(Savings())
    assert not prior.vae.use_tiling


# ------------------------------------------------------------------------------------------------------- out of memory
@pytest.fixture
def starving(monkeypatch):
    """Let the steps with these numbers, counted over the whole run, find no memory."""

    def starve(*calls: int):
        from splatedit.scenes import Splats

        plain, count = Splats.step, iter(range(1000))

        def step(self, *args):
            if next(count) in calls:
                # Half of a step is done: what is kept must not be this.
                with torch.no_grad():
                    self.parameters["sh0"].fill_(99.0)
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            plain(self, *args)

        monkeypatch.setattr(Splats, "step", step)

    return starve


@pytest.fixture
def settings(scene_file, tiny_model, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr("splatedit.work.FRAMES", 2)
    monkeypatch.setattr("splatedit.work.VIEWS", 2)
    words = ["steps=6", "cameras=orbit:3", "supersample=1", "guidance=dds", "checkpoint_every=1", "source_prompt=a cat"]
    given = {"scene": str(scene_file), "prompt": "a pig", "model": str(tiny_model), "output_dir": str(tmp_path / "out")}
    return lambda *more: load_config(options=given, words=[*words, *more])


def test_an_edit_that_finds_no_memory_goes_on_with_less(settings, starving, capfd):
    at = random.randrange(1, 6)
    starving(at)
    edit = run(settings())
    assert edit.status in (0, 3), f"no memory in step {at}"
    err = capfd.readouterr().err
    assert f"out of memory; going on after {at} steps as with --vram 24: vae_slicing=true, rows_at_once=16." in err
    assert edit.record["steps"] == 6 and edit.record["mended_splats"] == 0
    assert edit.record["stepped_down"] == {"after_steps": at, "vram": 24, "vae_slicing": True, "rows_at_once": 16}
    config = load_config(edit.folder / "config.yaml")
    assert (config.vram, config.vae_slicing, config.views_per_step) == (24, True, 2)


def test_a_second_time_is_the_end(settings, monkeypatch):
    def fails(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("splatedit.run.optimise", fails)
    with pytest.raises(OutOfMemory, match="out of memory again .*--vram 24; try a smaller --vram with --resume"):
        run(settings())
    with pytest.raises(OutOfMemory, match="with the smallest settings already"):
        run(settings("vram=8"))


@pytest.mark.slow
def test_the_edit_is_the_same_to_rounding(settings, starving):
    whole = run(settings())
    starving(3)
    edit = run(settings())
    curves = [json.loads((r.folder / "metrics.json").read_text())["curve"]["loss"] for r in (whole, edit)]
    assert curves[0][:3] == curves[1][:3] and len(curves[1]) == 6
    assert curves[1] == pytest.approx(curves[0], rel=0.02)


@pytest.mark.slow
def test_the_first_step_may_fail_and_a_run_that_failed_goes_on_with_less(settings, starving, tmp_path, capfd):
    starving(0)
    edit = run(settings("checkpoint_every=0", "vram=12"))
    assert edit.record["stepped_down"] == {"after_steps": 0, "vram": 8, "rows_at_once": 2, "views_per_step": 1}
    assert edit.record["steps"] == 6 and not edit.record["interrupted"]

    starving(2, 4)
    with pytest.raises(OutOfMemory, match="out of memory again"):
        run(settings(f"output_dir={tmp_path}/other"))
    assert "The edit is kept" in capfd.readouterr().err
    (folder,) = (tmp_path / "other" / "ball").iterdir()
    starving()
    done = run(load_config(options={"vram": 8}, defaults=load_config(folder / "config.yaml")), resume=folder)
    assert done.record["steps"] == 6 and done.record["resumed_after"][-1] == 3


def test_no_memory_is_exit_status_1(monkeypatch, capfd, tmp_path):
    from splatedit import cli

    def fails(*args, **more):
        raise OutOfMemory("out of memory again, with --vram 8; try a smaller model.")

    monkeypatch.setattr("splatedit.run.run", fails)
    monkeypatch.setattr("sys.argv", ["splatedit", "run", "a.ply", "a pig", "--vram", "8"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1 and capfd.readouterr().err.startswith("splatedit: error: out of memory again")
