"""Set-up shared by all tests: two cores, no network, a small scene and a small untrained prior."""

import os
import sys

# Before torch is imported: idle OpenMP threads sleep instead of spinning, and nobody asks a hub for anything.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

# The machine that has to pass has two cores: two workers with a thread each, or one process with two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items):
    """A GPU test chosen on a machine without one is skipped, not failed."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def chromium():
    """Headless Chromium, one for the whole session: two synchronous playwrights in a process break each other."""
    import shutil

    driver = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium")
    quiet = "--disable-background-networking --disable-component-update --disable-sync --disable-quic --no-first-run"
    with driver.sync_playwright() as play:
        flags = ["--no-sandbox", "--disable-gpu", *quiet.split()]  # as root in a container, without a GPU
        running = play.chromium.launch(executable_path=program, args=flags)
        yield running
        running.close()


@pytest.fixture
def browser(chromium):
    """Chromium without the pages of tests before: one that is left open goes on drawing, and slows down all others."""
    yield chromium
    for context in chromium.contexts:
        context.close()


@pytest.fixture
def few_frames(monkeypatch):
    """A run draws two pairs of pictures and a film of four frames."""
    monkeypatch.setattr("splatedit.work.FRAMES", 4)
    monkeypatch.setattr("splatedit.work.VIEWS", 2)


@pytest.fixture
def one_thread():
    """Small tensors: handing work between threads costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cloud():
    """300 opaque splats on a unit sphere around (0.5, 0, 0), red below and blue above (up is -y), SH degree 1."""
    from splatedit.gaussians import Gaussians

    rng = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(300, 3, generator=rng), dim=1)
    color = torch.stack([direction[:, 1], torch.zeros(300), -direction[:, 1]], 1) * 0.4 + 0.5
    return Gaussians(
        means=direction + torch.tensor([0.5, 0.0, 0.0]),
        quats=torch.randn(300, 4, generator=rng),
        scales=torch.full((300, 3), -2.0) + 0.2 * torch.randn(300, 3, generator=rng),
        opacities=torch.full((300,), 3.0),
        sh0=((color - 0.5) / 0.28209479177387814)[:, None],
        shN=0.05 * torch.randn(300, 3, 3, generator=rng),
        extra={"label": np.arange(300, dtype=np.int32)},
        comments=("made for a test",),
    )


@pytest.fixture
def scene_file(cloud, tmp_path):
    """The cloud as a file, without a sidecar."""
    from splatedit.files import save

    save(cloud, tmp_path / "ball.ply")
    return tmp_path / "ball.ply"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """An untrained prior of 32-pixel pictures in the format of the bundled one; it knows a cat, a pig and a dog."""
    import json

    from diffusers import AutoencoderTiny, UNet2DConditionModel

    from splatedit.pocket.train import export, new_text_encoder, new_tokenizer

    torch.manual_seed(0)
    tokenizer = new_tokenizer(("cat", "pig", "dog"))
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(16, 16, 16, 16),
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 0),
        latent_channels=4,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("tiny")
    export(folder, vae, unet, new_text_encoder(len(tokenizer)), tokenizer, 1.0, ("cat", "pig", "dog"))
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    (folder / "vocabulary.json").write_text(json.dumps({**vocabulary, "image_size": 32}))
    return folder


@pytest.fixture
def call(monkeypatch, capfd):
    """Run the command line in this process; returns exit status (0 too), stdout, stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["splatedit", *map(str, words)])
        from splatedit.cli import main

        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return end.value.code or 0, out, err

    return call
