"""Training of `pocket`: interrupted and resumed it gives the same weights; what it exports is what was trained."""

import json

import numpy as np
import pytest
import torch

from splatedit.pocket import train
from splatedit.pocket.judge import Judge, augment, confusion
from splatedit.pocket.views import COLORS, VIEWS, Pictures, caption


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = np.stack([np.arange(6) % 2, rng.integers(len(VIEWS), size=6), rng.integers(len(COLORS), size=6)], 1)
    return Pictures(rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), labels, ("cat", "pig"))


@pytest.fixture
def small(monkeypatch):
    """Networks of the real classes, small enough for a test, and batches of four."""
    from diffusers import UNet2DConditionModel

    def unet():
        return UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=8,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )

    monkeypatch.setattr(train, "new_unet", unet)


def denoiser(data, work, steps=4):
    latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1)).half()
    return train.train_denoiser(data, latents, work, steps, 1e9, seed=0, every=0)


def test_an_interrupted_training_ends_with_the_same_weights(data, tmp_path, small, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = denoiser(data, tmp_path / "whole")
    update, count = train.Average.update, []

    def cut(self, modules, step):
        count.append(step)
        if len(count) == 3:
            raise KeyboardInterrupt
        update(self, modules, step)

    monkeypatch.setattr(train.Average, "update", cut)
    with pytest.raises(KeyboardInterrupt):
        denoiser(data, tmp_path / "cut")
    monkeypatch.setattr(train.Average, "update", update)
    resumed = denoiser(data, tmp_path / "cut")
    for a, b in zip(whole[:2], resumed[:2], strict=True):
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_a_sample_sheet_is_drawn_at_every_checkpoint(data, tmp_path, small):
    from PIL import Image

    vae = train.new_vae().eval()

    def show(unet, text, tokenizer, step):
        path = tmp_path / f"{step}.png"
        train.draw_samples(unet, text, tokenizer, vae, 1.0, ["a cat", "a pig, side view"], path, steps=2)

    latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1)).half()
    train.train_denoiser(data, latents, tmp_path, 2, 1e9, seed=0, every=0, show=show)
    assert {p.name for p in tmp_path.glob("*.png")} == {"1.png", "2.png"}
    assert Image.open(tmp_path / "2.png").size == (2 * 32, 32)


def test_captions_drop_their_parts_as_often_as_said(data):
    rng = torch.Generator().manual_seed(0)
    labels = np.repeat(data.labels[:1], 4000, 0)
    prompts = train.random_captions(labels, data.names, rng)
    told = [p for p in prompts if p]
    assert 1 - len(told) / len(prompts) == pytest.approx(train.DROP_PROMPT, abs=0.02)
    assert sum("view" in p for p in told) / len(told) == pytest.approx(0.5, abs=0.03)
    assert sum("background" in p for p in told) / len(told) == pytest.approx(0.5, abs=0.03)
    assert all("cat" in p for p in told)


def test_every_caption_is_in_the_tokenizer_s_vocabulary():
    names = ("cat", "elephant")
    tokenizer = train.new_tokenizer(names)
    for name in names:
        for view in (None, *VIEWS):
            for color in (None, *COLORS):
                ids = tokenizer(caption(name, view, color)).input_ids
                assert tokenizer.unk_token_id not in ids and len(ids) <= train.MAX_TOKENS
    assert caption("elephant", "side", "orange") == "an elephant, side view, on an orange background"


def test_a_clock_follows_the_faster_of_steps_and_minutes():
    clock = train.Clock(steps=10, minutes=1.0)
    assert clock.tick() == pytest.approx(0.1, abs=0.01)
    clock.spent = 45.0
    assert clock.fraction == pytest.approx(0.75)


def test_exported_weights_are_the_trained_ones_in_half_precision(data, tmp_path, small):
    unet, text, tokenizer, curve = denoiser(data, tmp_path, steps=2)
    folder = tmp_path / "out"
    train.export(folder, train.new_vae(), unet, text, tokenizer, 1.5, data.names)
    from diffusers import UNet2DConditionModel

    loaded = UNet2DConditionModel.from_pretrained(folder / "unet")
    for p, q in zip(unet.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p.half(), q.half())
    assert json.loads((folder / "vocabulary.json").read_text())["prompts"] == ["a cat", "a pig"]
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 1.5
    assert curve == [] or curve[-1][0] > 0


def test_the_judge_counts_what_it_sees():
    judge = Judge(3).eval()
    with torch.no_grad():
        judge.head.weight.zero_()
        judge.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # sees class 1 everywhere
    table = confusion(judge, torch.rand(6, 3, 64, 64), 3, 2)
    assert table.tolist() == [[0, 2, 0], [0, 2, 0], [0, 2, 0]]


def test_the_judge_s_augmentation_stays_a_picture():
    rng = torch.Generator().manual_seed(0)
    pictures = torch.rand(8, 3, 16, 16, generator=rng)
    out = augment(pictures, rng)
    assert out.shape == pictures.shape and float(out.min()) >= 0 and float(out.max()) <= 1
    assert not torch.equal(out, pictures)
