"""Pictures edited in latent space: the loop, the reading of pictures, and what `splatedit image` leaves behind."""

import json
from functools import partial

import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image

from splatedit.config import GUIDANCES
from splatedit.diffusion import step_range
from splatedit.distilling import Distiller, Method
from splatedit.errors import InputError
from splatedit.image_run import ImageOptions, edit_files, file_names, labelled
from splatedit.images import (
    PRESETS,
    SGD_STEP,
    LatentImage,
    decode,
    edit_images,
    encode,
    preset,
    read_picture,
    suited_scale,
)
from splatedit.priors import Prior, load_prior
from splatedit.tuning import Tuning

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prior():
    return Prior(tiny.sd())


def pictures(prior, n=2, seed=0):
    side = prior.image_size
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_published_settings_are_the_papers():
    for name in ("ids", "dds", "cds"):
        found = PRESETS[name]
        assert (found.steps, found.t_range, found.guidance_scale) == (200, (0.05, 0.948), 7.5)
        assert found.rate == pytest.approx(0.048828125, abs=1e-12), "2000 / (64 64) times 0.1: methods, DDS"
        assert "arXiv" in found.source
    assert set(PRESETS) < set(GUIDANCES) and "not published" in preset("sds").source
    assert step_range(torch.linspace(1, 0.01, 1000), PRESETS["ids"].t_range) == (50, 948), "randint(50, 949)"


def test_a_full_model_gets_the_published_scale_and_a_small_one_its_own(prior, tiny_model):
    small = load_prior(str(tiny_model))
    assert suited_scale(prior, "dds") == 7.5 and suited_scale(prior, "sds") == 100
    assert suited_scale(small, "dds") == small.default_scale("dds") == 3.0
    assert suited_scale(prior, "dds", 2.0) == suited_scale(small, "dds", 2.0) == 2.0


def test_a_scene_of_latents_steps_down_its_gradient():
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scene, gradient = LatentImage(z, 0.5), torch.ones_like(z)
    assert torch.equal(scene(), z) and torch.equal(scene([1]), z[1:])
    scene().backward(gradient)
    scene.step()
    assert torch.equal(scene.result(), z - 0.5 * gradient) and torch.equal(scene.source, z)
    scene([1]).backward(gradient[1:])
    scene.step(1.0, 0.1)
    torch.testing.assert_close(scene.result(), torch.stack([z[0] - 0.5, z[1] - 0.55]))


def test_an_edit_is_the_descent_along_the_distiller_s_gradients(prior):
    batch = pictures(prior)
    steps = list(edit_images(batch, "a pig", "a cat", model=prior, guidance="dds", steps=3, seed=7))
    z = encode(prior, batch)
    method = Method("dds", 7.5, PRESETS["dds"].t_range, anneal=0.0)
    distiller = Distiller(prior, method, "a pig", "a cat", z, torch.Generator().manual_seed(7))
    for index, step in enumerate(steps):
        z = z - SGD_STEP * distiller(z, [0, 1], index / 2).gradient
        torch.testing.assert_close(step.latents, z, rtol=0, atol=1e-6)
        assert (step.index, step.steps) == (index, 3) and step.loss > 0
    assert torch.equal(steps[-1].pictures(), decode(prior, steps[-1].latents))
    assert steps[-1].pictures().shape == batch.shape
    again = list(edit_images(batch, "a pig", "a cat", model=prior, guidance="dds", steps=3, seed=7))
    assert torch.equal(again[-1].latents, steps[-1].latents), "the same seed, bit for bit"


@pytest.mark.parametrize("name", GUIDANCES)
def test_every_guidance_edits_pictures(name, prior):
    batch = pictures(prior)
    *_, last = edit_images(batch, "a pig", "a cat", model=prior, guidance=name, steps=2)
    assert last.latents.isfinite().all() and not torch.equal(last.latents, encode(prior, batch))
    assert (last.fpr is not None) == (name == "ids") and bool(last.residuals) == (name == "ids")


@pytest.mark.parametrize("name", ["dds", "cds", "pds", "ids"])
def test_asking_for_the_source_changes_nothing(name, prior):
    batch = pictures(prior)
    options = {"model": prior, "guidance": name, "steps": 2}
    if name == "cds":
        options["tuning"] = Tuning(cds_weight=0.0)  # the contrastive part pulls on noise of its own
    *_, last = edit_images(batch, "a cat", "a cat", **options)
    torch.testing.assert_close(last.latents, encode(prior, batch), rtol=0, atol=1e-5)


def test_ids_without_iterations_is_dds_and_a_longer_list_of_settings_is_passed_on(prior):
    batch = pictures(prior)
    options = {"model": prior, "steps": 2, "timesteps": "stratified"}
    *_, none = edit_images(batch, "a pig", "a cat", guidance="ids", fpr_iters=0, **options)
    *_, dds = edit_images(batch, "a pig", "a cat", guidance="dds", **options)
    *_, uniform = edit_images(batch, "a pig", "a cat", guidance="dds", **{**options, "timesteps": "uniform"})
    assert torch.equal(none.latents, dds.latents) and not torch.equal(dds.latents, uniform.latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GUIDANCES)
def test_half_precision_networks_edit_single_precision_latents(name, dtype):
    half = Prior(tiny.sd(), dtype=dtype)
    *_, last = edit_images(pictures(half, 1), "a pig", "a cat", model=half, guidance=name, steps=1)
    assert last.latents.dtype == torch.float32 and last.latents.isfinite().all()
    assert last.pictures().dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (torch.rand(1, 3, 33, 32), {}, "32x33 pixels, expected multiples of"),
        ([torch.rand(3, 32, 32), torch.rand(3, 32, 64)], {}, "found 2 sizes .3x32x32, 3x32x64."),
        ([], {}, "no picture"),
        (torch.rand(1, 1, 32, 32), {}, "expected .b, 3, h, w."),
        (torch.full((1, 3, 32, 32), 255.0), {}, "outside .0, 1."),
        (torch.rand(1, 3, 32, 32), {"steps": 0}, "1 or more steps"),
        (torch.rand(1, 3, 32, 32), {"rate": float("nan")}, "rate above 0"),
        (torch.rand(1, 3, 32, 32), {"guidance": "idz"}, "'idz' is not known"),
        (torch.rand(1, 3, 32, 32), {"t_range": (0.5, 2.0)}, "t_range"),
    ],
)
def test_a_mistake_is_an_input_error_in_one_line(given, options, message, prior):
    with pytest.raises(InputError, match=message) as error:
        next(edit_images(given, "a pig", "a cat", model=prior, **options))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- pictures from disk
def test_a_picture_becomes_a_square(tmp_path):
    stripes = np.zeros((20, 40, 3), np.uint8)
    stripes[:, 10:30] = 255  # the middle square is white
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    assert torch.equal(read_picture(tmp_path / "wide.png", 20), torch.ones(3, 20, 20))
    stretched = read_picture(tmp_path / "wide.png", 20, "stretch")
    assert stretched[:, :, 0].max() < 0.1 and stretched[:, :, 10].min() > 0.9 and stretched.shape == (3, 20, 20)


def test_transparency_orientation_and_grey(tmp_path):
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[:8] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    half = read_picture(tmp_path / "clear.png", 16)
    assert half[:, 0, 0].tolist() == [1, 0, 0] and half[:, -1, 0].tolist() == [1, 1, 1], "nothing is white"

    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(np.flip(clear[..., :3], 0).copy()).save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png", 16)[:, 0, 0].tolist() == [1, 0, 0]

    for array, mode in ((np.full((16, 16), 128, np.uint8), "L"), (np.full((16, 16), 32768, np.uint16), "I;16")):
        Image.fromarray(array).save(tmp_path / "grey.png")
        assert read_picture(tmp_path / "grey.png", 16).mean().item() == pytest.approx(0.5, abs=0.01), mode


@pytest.fixture
def album(tmp_path):
    """Three pictures of three sizes in a folder, and a file that is none."""
    rng = np.random.default_rng(0)
    (tmp_path / "album").mkdir()
    for name, size in (("one.png", (40, 32)), ("two.jpg", (32, 50)), ("three.webp", (64, 64))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "album" / name)
    (tmp_path / "album" / "notes.txt").write_text("not a picture")
    return tmp_path / "album"


@pytest.fixture
def call(call):
    """Run `splatedit image` in this process; returns exit status, stdout, stderr."""
    return partial(call, "image")


def test_a_folder_by_two_guidances_and_two_prompts(call, album, tiny_model, tmp_path):
    before = {p: p.read_bytes() for p in album.iterdir()}
    words = ["--source", "a cat", "--compare", "dds,ids", "--steps", 2, "--rate", 0.5, "--model", tiny_model]
    status, out, err = call(album, "a pig", "a dog", *words, "-o", tmp_path / "out")
    assert status in (0, 3), err
    paths = out.splitlines()
    names = [p.rsplit("/", 1)[1] for p in paths]
    assert names[:4] == ["one_a-pig_dds.png", "one_a-pig_ids.png", "one_a-dog_dds.png", "one_a-dog_ids.png"]
    assert len(names) == 3 * 2 * 2 and {Image.open(p).size for p in paths} == {(32, 32)}
    (folder,) = (tmp_path / "out" / "album").iterdir()
    assert {p.name for p in folder.iterdir()} == {*names, "sources", "grid.png", "metrics.json", "run.json", "cmd.txt"}
    assert Image.open(folder / "grid.png").width == 3 * 32 + 2 * 4

    edits = json.loads((folder / "metrics.json").read_text())["edits"]
    assert [e["file"] for e in edits] == names
    by = {e["file"]: e for e in edits}["two_a-dog_ids.png"]
    assert (by["source_prompt"], by["source_prompt_from"], by["prompt"]) == ("a cat", "option", "a dog")
    assert (by["guidance_scale"], by["rate"], by["steps"], by["fpr_iters"]) == (3.0, 0.5, 2, 3)
    assert (by["evaluations"], by["backwards"]) == (2 * 10, 2 * 6), "of one picture: 2 N + 4 forward, 2 N back"
    assert 0 < by["psnr_to_source"] <= by["autoencoder_psnr"] + 3 and 0 < by["ssim_to_source"] < 1
    assert isinstance(by["prefers_target"], bool) and by["seconds"] > 0 and "2502.19930" in by["settings_from"]
    record = json.loads((folder / "run.json").read_text())
    assert record["options"]["prompts"] == ["a pig", "a dog"] and record["exit_status"] == status
    assert {p: p.read_bytes() for p in album.iterdir()} == before, "pictures are only read"

    call(album, "a pig", "a dog", *words, "-o", tmp_path / "out")
    assert len(list((tmp_path / "out" / "album").iterdir())) == 2, "a second run gets a folder of its own"


def test_names_of_files_differ_and_labels_are_cut_to_the_tile():
    assert file_names(["a", "A", "a-2", "b c", "?"]) == ["a", "a-2", "a-2-2", "b-c", "edit"]
    long = ["x" * 60 + end for end in "12"]
    assert len(set(file_names(long))) == 2, "prompts that differ after what a name holds"
    tile = labelled(np.zeros((600, 300, 3), np.uint8), ["a very long label " * 20, "猫"])
    assert tile.shape == (256 + 2 * 18, 128, 3) and tile[40:].max() == 0 and tile[:18].min() < 128


def test_one_at_a_time_a_picture_does_not_know_its_neighbours(call, album, tiny_model, tmp_path):
    words = ["--source", "a cat", "--guidance", "dds", "--steps", 2, "--model", tiny_model, "--batch", 1]
    _, many, _ = call(album, "a pig", *words, "-o", tmp_path / "a")
    _, alone, _ = call(album / "two.jpg", "a pig", *words, "-o", tmp_path / "b")
    same = [p for p in many.splitlines() if "/two_" in p]
    np.testing.assert_array_equal(Image.open(same[0]), Image.open(alone.strip()))


def test_the_model_says_what_a_picture_shows(call, album, tiny_model, tmp_path):
    words = ["--guidance", "dds", "--steps", 1, "--model", tiny_model, "-o", tmp_path / "out"]
    _, out, err = call(album / "one.png", "a pig", *words)
    (folder,) = (tmp_path / "out" / "one").iterdir()
    (edit,) = json.loads((folder / "metrics.json").read_text())["edits"]
    assert edit["source_prompt_from"] == "model" and edit["source_prompt"] in ("a cat", "a pig", "a dog")
    assert "--source overrides it" in err and out.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png", "a pig"], "none.png: no such file or folder"),
        (["broken.png", "a pig"], "broken.png: cannot be read"),
        (["tiny.png", "a pig"], "tiny.png: found 4x4 pixels"),
        (["empty", "a pig"], "empty: holds no picture"),
        (["good.png"], "PROMPT"),
        (["good.png", " "], "prompt: it is empty"),
        (["good.png", "a unicorn"], "does not know 'unicorn'"),
        (["good.png", "a pig", "a pig"], "asked for twice"),
        (["good.png", "a pig", "--compare", "ids,ids"], "--compare"),
        (["good.png", "a pig", "--compare", "ids,ddz"], "did you mean 'dds'?"),
        (["good.png", "a pig", "--compare", ""], "choose one of"),
        (["good.png", "a pig", "--solver", "newton"], "solver"),
        (["good.png", "a pig", "--steps", "0"], "steps: found 0"),
        (["good.png", "a pig", "--rate", "-1"], "rate: found -1"),
        (["good.png", "a pig", "--batch", "0"], "batch: found 0"),
        (["good.png", "a pig", "--fit", "squeeze"], "'squeeze'"),
        (["good.png", "a pig", "--device", "cuda:99x"], "device"),
        (["good.png", "a pig", "--guidance-scale", "nan"], "guidance_scale"),
        (["good.png", "a pig", "-o", "good.png"], "cannot be written to"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(call, words, message, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("good.png")
    Image.new("RGB", (4, 4)).save("tiny.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "empty").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    status, out, err = call(*words, "--model", tiny_model, "--source", "a cat")
    last = err.splitlines()[-1]
    assert status == 2 and out == "" and last.startswith("splatedit: error: ") and message in last, err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_ctrl_c_keeps_whole_edits_and_nothing_else(album, tiny_model, tmp_path, monkeypatch):
    from splatedit import image_run

    original, calls = image_run.edit_batch, []

    def interrupted(*words):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*words)

    monkeypatch.setattr(image_run, "edit_batch", interrupted)
    options = ImageOptions(
        str(album),
        ("a pig",),
        "a cat",
        ("dds", "ids"),
        model=str(tiny_model),
        steps=1,
        batch=3,
        output_dir=str(tmp_path / "out"),
    )
    outcome = edit_files(options)
    assert outcome.status == 130 and outcome.record["interrupted"]
    assert [p.name for p in outcome.files] == ["one_a-pig_dds.png", "three_a-pig_dds.png", "two_a-pig_dds.png"]
    calls[:] = [None]
    with pytest.raises(KeyboardInterrupt):
        edit_files(options)
    assert len(list((tmp_path / "out" / "album").iterdir())) == 1
