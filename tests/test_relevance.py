"""Relevance: maps of exact denoisers and attention, what is lifted of them, where it is cut and when it is refused."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from splatedit import relevance
from splatedit.attention import cross_attention
from splatedit.cameras import dome
from splatedit.diffusion import MixtureDenoiser, Text, repeat
from splatedit.errors import InputError
from splatedit.gaussians import SH_C0, Gaussians
from splatedit.priors import load_prior
from splatedit.relevance import (
    DRAWS,
    Measured,
    attention_maps,
    blurred,
    by_attention,
    by_scores,
    different,
    measure,
    otsu,
    places,
    threshold,
)
from splatedit.render import render

pytestmark = pytest.mark.usefixtures("one_thread")

GREY, RED, BLUE, WHITE = (0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)
WORDS = {"grey and red": (1, 1, 0, 1), "grey and blue": (1, 0, 1, 1), "grey": (1, 0, 0, 1)}
CONTRAST = 8.0  # of the latents: colours lie far apart, even beside the noise


class Pixels:
    """An exact prior: every pixel on its own is one of the colours that the prompt names."""

    image_size = 32

    def __init__(self):
        colors = torch.tensor([GREY, RED, BLUE, WHITE])
        self.mixture = MixtureDenoiser(CONTRAST * (colors - 0.5)[..., None, None], floor=0.05)
        self.alphas_cumprod = self.mixture.alphas_cumprod

    def text(self, prompts):
        (prompt,) = prompts
        return self.mixture.text([float(weight) for weight in WORDS[prompt]])

    def encode(self, pictures):
        return CONTRAST * (F.avg_pool2d(pictures, 2) - 0.5)

    def denoise(self, x, t, text):
        b, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, c, 1, 1)
        each = Text(text.embeds.repeat_interleave(h * w, 0))
        return self.mixture(rows, t.repeat_interleave(h * w), each).view(b, h, w, c).permute(0, 3, 1, 2)


def balls(*colors):
    """A ball of 200 opaque splats for each colour, in a row along x."""
    rng, parts = torch.Generator().manual_seed(0), []
    for place, color in enumerate(colors):
        direction = F.normalize(torch.randn(200, 3, generator=rng), dim=1)
        parts.append((direction + torch.tensor([3.0 * place, 0, 0]), torch.tensor(color).expand(200, 3)))
    means, colors = (torch.cat(column) for column in zip(*parts, strict=True))
    n = len(means)
    return Gaussians(
        means=means,
        quats=torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1),
        scales=torch.full((n, 3), math.log(0.15)),
        opacities=torch.full((n,), 6.0),
        sh0=((colors - 0.5) / SH_C0)[:, None],
        shN=torch.zeros(n, 0, 3),
    )


def seen(gaussians, target, source, seed=0):
    """What the exact prior says about the scene from six sides."""
    prior, cameras = Pixels(), dome(gaussians, 6, size=32, up="-y")
    z = prior.encode(render(gaussians, cameras).rgb.clamp(0, 1))
    maps = by_scores(prior, z, target, source, torch.Generator().manual_seed(seed))
    assert maps.shape == (6, DRAWS, 16, 16)
    return maps, measure(gaussians, cameras, maps)


def test_what_has_to_change_is_found_exactly():
    scene = balls(GREY, RED, GREY)
    maps, found = seen(scene, "grey and blue", "grey and red")
    torch.testing.assert_close(maps.mean((0, 2, 3)), torch.ones(DRAWS), rtol=1e-5, atol=0)
    red = torch.arange(600) // 200 == 1
    assert (found.values > threshold(found)).equal(red)
    assert found.agreement > 0.98 and found.contrast > 5


def test_a_splat_that_nobody_sees_takes_after_its_neighbours():
    scene = balls(GREY, RED)
    inside = torch.tensor([[0.0, 0, 0], [3.0, 0, 0]])  # in the middle of each ball
    means = torch.cat([scene.means, inside])
    scene = scene.select([*range(400), 0, 200])._replace(means=means)
    _, found = seen(scene, "grey and blue", "grey and red")
    assert (found.values > found.cut)[-2:].tolist() == [False, True]


def test_asking_for_the_source_is_refused():
    maps, found = seen(balls(GREY, RED), "grey and red", "grey and red")
    assert not maps.any() and not found.values.any() and found.values.isfinite().all()
    with pytest.raises(InputError, match="the model does not say where"):
        threshold(found)


def test_an_edit_about_everything_is_refused_but_can_be_cut_by_hand():
    _, found = seen(balls(RED), "grey and blue", "grey and red")
    assert found.contrast < 1.1
    with pytest.raises(InputError, match="nothing stands out.*leave the mask out.*mask_threshold"):
        threshold(found)
    assert threshold(found, 0.25) == 0.25
    assert (found.values > 0.25).all()


def test_noise_is_refused():
    scene, rng = balls(GREY, RED), torch.Generator().manual_seed(0)
    cameras = dome(scene, 4, size=32, up="-y")
    found = measure(scene, cameras, torch.rand(4, 2, 16, 16, generator=rng))
    assert found.agreement < 0.5
    assert "does not say" in str(pytest.raises(InputError, threshold, found).value)


def test_maps_are_lifted_as_they_are():
    """A map that is 1 on one ball and 0 elsewhere is the relevance of that ball's splats."""
    scene = balls(GREY, RED)
    cameras = dome(scene, 4, size=64, up="-y")
    red = scene.select(slice(200, 400))
    shape = (render(red, cameras).alpha > 0.5).float().expand(-1, 2, -1, -1)
    found = measure(scene, cameras, shape)
    assert (found.values > found.cut).equal(torch.arange(400) >= 200)
    assert found.agreement == pytest.approx(1, abs=1e-6)
    assert float(found.values.quantile(0.95)) == pytest.approx(1, abs=1e-5)
    assert float(found.values[:200].mean()) < 0.1


# ------------------------------------------------------------------------------------------------------- the cut
def between(ordered, k):
    """Variance between the first k values and the rest."""
    low, high = ordered[:k], ordered[k:]
    return len(low) * len(high) * (high.mean() - low.mean()) ** 2 / len(ordered) ** 2


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=30))
@settings(max_examples=50, deadline=None)
def test_otsu_is_the_best_of_all_cuts(whole):
    values = torch.tensor(whole, dtype=torch.float64) / 100
    cut, contrast = otsu(values)
    ordered = np.sort(values.numpy())
    if ordered[0] == ordered[-1]:
        assert (cut, contrast) == (ordered[-1], 1.0)
        return
    best = max(between(ordered, k) for k in range(1, len(ordered)))
    low, high = ordered[ordered <= cut], ordered[ordered > cut]
    assert len(low) and len(high)
    assert between(ordered, len(low)) == pytest.approx(best, rel=1e-9)
    if low.mean() > 0:
        assert contrast == pytest.approx(high.mean() / low.mean())


def test_otsu_of_two_heaps():
    cut, contrast = otsu(torch.tensor([1.0, 1.1, 0.9, 5.0, 5.2, 4.8, 1.0]))
    assert 1.1 < cut < 4.8 and contrast == pytest.approx(5.0)
    assert otsu(torch.tensor([2.0])) == (2.0, 1.0) and otsu(torch.zeros(5)) == (0.0, 1.0)


def test_blurring_keeps_the_level_and_spreads_evenly():
    torch.testing.assert_close(blurred(torch.full((2, 3, 5, 7), 0.7), 0.6), torch.full((2, 3, 5, 7), 0.7))
    dot = torch.zeros(1, 2, 9, 9)
    dot[0, 1, 4, 4] = 1
    soft = blurred(dot, 0.6)
    assert not soft[0, 0].any() and float(soft.sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(soft, soft.flip(2, 3))
    ratio = float(soft[0, 1, 4, 5] / soft[0, 1, 4, 4])
    assert ratio == pytest.approx(math.exp(-0.5 / 0.36), rel=1e-5)


def test_thresholds():
    good = Measured(torch.tensor([0.1, 0.9]), 0.9, 0.5, 9.0)
    assert threshold(good) == 0.5
    for poor in (good._replace(agreement=0.4), good._replace(contrast=1.1)):
        with pytest.raises(InputError, match="mask_text"):
            threshold(poor)


# ------------------------------------------------------------------------------------------------ attention, tokens
@pytest.fixture(scope="module")
def prior(tiny_model):
    return load_prior(str(tiny_model))


def test_cross_attention_is_softmax_of_queries_and_keys(prior):
    z, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 600])
    text = repeat(prior.text(["a cat"]), 2)
    plain, before, given_to, hooks = prior.denoise(z, t, text), prior.unet.attn_processors, [], []
    for name, module in prior.unet.named_modules():
        if name.endswith("attn2"):
            hooks.append(module.register_forward_pre_hook(lambda m, a, k: given_to.append((m, a, k)), with_kwargs=True))
    try:
        with prior.cross_attention() as layers, torch.no_grad():
            watched = prior.denoise(z, t, text)
    finally:
        for hook in hooks:
            hook.remove()
    assert watched.equal(plain) and prior.unet.attn_processors == before
    assert len(layers) == len(given_to) > 1
    with torch.no_grad():
        for looks, (module, args, kwargs) in zip(layers, given_to, strict=True):
            q, k = module.to_q(args[0]), module.to_k(kwargs["encoder_hidden_states"])
            q, k = (x.unflatten(2, (module.heads, -1)).transpose(1, 2) for x in (q, k))
            expected = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1).mean(1)
            torch.testing.assert_close(looks, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(looks.sum(-1), torch.ones(looks.shape[:2]))


def test_processors_come_back_after_an_exception_and_a_unet_without_is_told(prior):
    before = prior.unet.attn_processors
    with pytest.raises(ZeroDivisionError), prior.cross_attention():
        raise ZeroDivisionError
    assert prior.unet.attn_processors == before
    with pytest.raises(InputError, match="no cross-attention"), cross_attention(SimpleNamespace(attn_processors={})):
        pass


def test_attention_maps_show_where_a_token_is_looked_at():
    looked = torch.zeros(16, 5)  # a grid of 4x4, five tokens
    looked[:, 0], looked[5, 2], looked[5, 0] = 1, 0.75, 0.25  # place 5 is row 1, column 1
    layers, given_text = [], []

    @contextmanager
    def watching():
        layers.clear()
        yield layers

    def denoise(x, t, text):
        given_text.append(text)
        layers.extend([torch.rand(len(x), 4, 5), looked.expand(len(x), 16, 5), looked.expand(len(x), 16, 5)])
        return x

    toy = SimpleNamespace(
        text=lambda prompts: Text(torch.zeros(1, 5, 2)),
        cross_attention=watching,
        denoise=denoise,
        alphas_cumprod=MixtureDenoiser(torch.zeros(1, 1, 1, 1)).alphas_cumprod,
    )
    maps = attention_maps(toy, torch.zeros(3, 4, 8, 8), "a cat", [2, 3], torch.Generator().manual_seed(0))
    assert maps.shape == (3, DRAWS, 8, 8) and len(given_text) == DRAWS
    assert maps[1, 2].argmax() in (18, 19, 26, 27), "rows 2 and 3, columns 2 and 3"
    assert not maps[:, :, 5:].any() and not maps[:, :, :, 5:].any()
    torch.testing.assert_close(maps.mean((0, 2, 3)), torch.ones(DRAWS))


def test_tokens_in_which_prompts_differ():
    assert different([1, 5, 6, 2], [1, 5, 7, 2]) == [2]
    assert different([1, 5, 6, 2], [1, 5, 6, 2]) == []
    assert different([1, 5, 2], [1, 5, 8, 9, 2]) == []
    assert different([1, 5, 8, 9, 2], [1, 5, 2]) == [2, 3]


def test_places_of_words(prior):
    (cat,) = places(prior, "a cat", "cat")
    both = places(prior, "a cat and a pig", "pig, cat")
    assert cat in both and len(both) == 2 and places(prior, "a cat and a cat", "cat") == [cat, cat + 3]
    for words, message in (("pig", "'pig' is not in the source prompt 'a cat'"), (" , ", "it is empty")):
        with pytest.raises(InputError, match=message):
            places(prior, "a cat", words)


def test_attention_of_prompts_that_differ_in_nothing(prior):
    z = torch.zeros(1, 4, 4, 4)
    with pytest.raises(InputError, match="the same to the model"):
        by_attention(prior, z, "a cat", "a cat", torch.Generator())
    maps = by_attention(prior, z, "a pig", "a cat", torch.Generator().manual_seed(0))
    assert maps.shape == (1, DRAWS, 4, 4) and bool((maps > 0).all())


def test_the_ways_are_those_of_the_settings():
    from splatedit.config import MASK_BY

    assert tuple(relevance.MAPS) == MASK_BY
