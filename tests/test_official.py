"""Parity with the official code of IDS, where its sources are at hand: SPLATEDIT_OFFICIAL_IDS names their folder.

Nothing of it is part of this repository; CONTRIBUTING says where it comes from. Compared is what one step computes,
on a random network in double precision and a batch of one (its norm runs over the whole batch).
"""

import importlib.util
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from splatedit.diffusion import Draw, Text, guided, scaled_linear, scales
from splatedit.fpr import REFERENCE_SIZE, fpr
from splatedit.guidance import Request, ids

VARIABLE = "SPLATEDIT_OFFICIAL_IDS"
FOLDER = os.environ.get(VARIABLE)
pytestmark = pytest.mark.skipif(not FOLDER, reason=f"{VARIABLE} names no folder with the official IDS sources")

SIDE, SCALE, LENGTH = 8, 7.5, 1.0  # of the latents; guidance scale; lambda as the official code counts it
CLOSE = {"rtol": 0, "atol": 1e-10}


def official():
    """The class IDSLoss of the official sources."""
    path = Path(str(FOLDER)) / "utils" / "loss.py"
    assert path.is_file(), f"{VARIABLE}: {path} is not there; expected a copy of github.com/shhh0620/IDS."
    spec = importlib.util.spec_from_file_location("official_ids_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.IDSLoss


@pytest.fixture(scope="module")
def network():
    """A small random U-Net, in double precision."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=SIDE,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=8,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        .double()
        .requires_grad_(False)
    )


@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("t", [60, 500, 940])
def test_a_step_is_the_official_one(network, t, iters):
    generator = torch.Generator().manual_seed(1)
    null, source, target = torch.randn(3, 1, 5, 12, dtype=torch.float64, generator=generator)
    z_source, z, noise = torch.randn(3, 1, 4, SIDE, SIDE, dtype=torch.float64, generator=generator)
    table, step = scaled_linear(), torch.tensor([t])
    a, s = scales(table, step, z)

    scheduler = SimpleNamespace(alphas_cumprod=table)
    theirs = official()(50, 950, network, LENGTH, scheduler, iters, torch.device("cpu"))
    texts = {"source": torch.stack([null, source], 1), "target": torch.stack([null, target], 1)}
    x, norms = theirs.update_zt(z_source, a * z_source + s * noise, step, texts["source"], SCALE)
    found = theirs.estimate_eps(z_source, x, step)
    with torch.no_grad():
        gradient = theirs.get_epsilon_prediction(a * z + s * found, step, texts["target"], SCALE)
        gradient = gradient - theirs.get_epsilon_prediction(x, step, texts["source"], SCALE)

    def denoise(x, t, text):
        return network(x, t, text.embeds).sample

    ours, draw = guided(denoise, Text(null), SCALE), Draw(step, a, s, noise)
    lam = LENGTH / math.sqrt(z[0].numel() / REFERENCE_SIZE)  # ours is a length at 4x64x64 and grows with the size
    refined = fpr(ours, z_source, draw, Text(source), iters, lam)
    request = Request(Text(target), Text(source), z_source)
    torch.testing.assert_close(a * z_source + s * refined.noise, x, **CLOSE)
    torch.testing.assert_close(refined.noise, found, **CLOSE)
    torch.testing.assert_close(refined.residuals[:, 0], torch.stack(norms).detach(), **CLOSE)
    torch.testing.assert_close(ids(ours, z, draw, request, iters, lam), gradient, **CLOSE)
