"""Every guidance on every kind of model, in half precision too, and what must not be asked of them."""

from functools import cache

import pytest
import tiny_models as tiny
import torch
from mixtures import SHAPE, Affine, Modes, draw_at, exact, normal, seeded

from splatedit.diffusion import guided, repeat, sample_draw
from splatedit.editing import edit
from splatedit.errors import InputError
from splatedit.guidance import GUIDANCE, Request, dds, fpr, ids
from splatedit.priors import Prior, load_prior
from splatedit.timesteps import PUBLISHED
from splatedit.tuning import Tuning, bind

HALF = [torch.float16, torch.bfloat16]


@cache
def prior_of(pipeline, dtype=torch.float32):
    return Prior(pipeline(), dtype=dtype)


def gradient(name, prior, dtype=torch.float32):
    z, z_source = (torch.randn(2, 4, 8, 8, generator=seeded(s)).to(dtype) for s in (1, 2))
    texts = (repeat(prior.text([p]), 2) for p in ("a pig", "a cat"))
    request = Request(*texts, z_source, camera=torch.randn(2, 16, generator=seeded(3)))
    draw = sample_draw(prior.alphas_cumprod, z, (0.2, 0.6), seeded(4))
    options = bind(name, prior, seeded(5))
    with torch.no_grad():
        return GUIDANCE[name](guided(prior.denoise, prior.null(), 3.0), z, draw, request, **options)


@pytest.mark.parametrize(
    ("latents", "network"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float16), (torch.float64, torch.bfloat16)],
)
def test_latents_of_any_type_get_gradients_of_that_type(latents, network):
    prior = prior_of(tiny.sd, network)
    for name in GUIDANCE:
        grad = gradient(name, prior, latents)
        assert grad.dtype == latents and grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("pipeline", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize("name", GUIDANCE)
def test_gradients_are_single_precision_and_nearly_those_of_single_networks(name, pipeline, dtype):
    exact, found = (gradient(name, prior_of(pipeline, d)) for d in (torch.float32, dtype))
    assert found.dtype == torch.float32 and found.isfinite().all()
    # vsd begins as the difference of two nearly equal scores, and is as precise as they are.
    size = (gradient("sds", prior_of(pipeline)) if name == "vsd" else exact).norm()
    assert (found - exact).norm() < 10 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", GUIDANCE)
def test_an_edit_runs_in_half_precision_and_its_splats_are_single(name, dtype, cloud):
    prior = prior_of(tiny.sd, dtype)
    *_, last = edit(cloud, "a pig", "a cat", model=prior, guidance=name, steps=2, views=3, supersample=1, neighbours=0)
    for value in last.gaussians.parameters.values():
        assert value.dtype == torch.float32 and value.isfinite().all()
    assert last.loss > 0 and not torch.equal(last.gaussians.sh0, cloud.sh0)


@pytest.fixture(scope="module")
def priors():
    return {"bundled": load_prior("pocket"), "sdxl": prior_of(tiny.sdxl), "v": Prior(tiny.sd("v_prediction"))}


@pytest.mark.parametrize("kind", ["bundled", "sdxl", "v"])
@pytest.mark.parametrize("name", GUIDANCE)
def test_every_guidance_edits_splats_with_every_kind_of_model(name, kind, priors, cloud):
    settings = {"steps": 1, "views": 3, "views_per_step": 1, "supersample": 1, "neighbours": 0}
    step = next(edit(cloud, "a pig", "a cat", model=priors[kind], guidance=name, **settings))
    assert 0 < step.loss < 100 and step.gaussians.sh0.isfinite().all()
    assert not torch.equal(step.gaussians.sh0, cloud.sh0)
    assert all(p.grad is None and not p.requires_grad for p in priors[kind].unet.parameters())


def test_a_torch_without_half_precision_on_the_cpu_says_so(monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.functional, "conv2d", missing)
    with pytest.raises(InputError, match="dtype: torch .* cannot compute float16 networks on a CPU .*; use float32"):
        Prior(tiny.sd(), dtype=torch.float16)


# ------------------------------------------------------------------------------------------------- what cannot be asked
def test_no_iterations_are_dds_bit_for_bit():
    modes = Modes()
    z, draw = normal(2, *SHAPE, seed=5), draw_at([300, 800], normal(2, *SHAPE, seed=6))
    request = modes.request(normal(2, *SHAPE, seed=7))
    assert torch.equal(ids(modes.denoise, z, draw, request, iters=0), dds(modes.denoise, z, draw, request))


def test_a_negative_lambda_or_count_is_an_error(cloud):
    modes, z = Modes(), normal(1, *SHAPE)
    with pytest.raises(InputError, match="-1"):
        fpr(modes.denoise, z, draw_at([500], z), modes.source, lam=-1.0)
    with pytest.raises(InputError, match="-1"):
        fpr(modes.denoise, z, draw_at([500], z), modes.source, iters=-1)


@pytest.mark.parametrize("name", ["ids", "dds", "cds", "pds", "dreamcatalyst"])
def test_latents_of_two_sizes_are_an_error(name):
    prior = prior_of(tiny.sd)
    z, other = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 16)
    draw = sample_draw(prior.alphas_cumprod, z, (0.2, 0.6), seeded())
    request = Request(prior.text(["a pig"]), prior.text(["a cat"]), other)
    options = bind(name, prior, seeded())
    with pytest.raises(InputError, match="latents: found 4x8x16, expected 4x8x8; pictures of several sizes"):
        GUIDANCE[name](guided(prior.denoise, prior.null(), 3.0), z, draw, request, **options)


@pytest.mark.parametrize("way", ["distilled", "vocabulary"])
def test_a_model_without_a_null_prompt_takes_no_guidance_scale_but_one(way, cloud):
    pipeline, vocabulary = tiny.sd(), None
    if way == "distilled":
        torch.manual_seed(0)
        pipeline.register_modules(unet=tiny.unet(time_cond_proj_dim=8))
    else:
        vocabulary = {"prompts": ["a cat"], "words": ["a", "cat", "pig"], "null": False}
    prior = Prior(pipeline, vocabulary=vocabulary)
    assert {prior.default_scale(name) for name in GUIDANCE} == {1.0}
    settings = {"model": prior, "steps": 1, "views": 3, "supersample": 1, "neighbours": 0, "guidance": "dds"}
    assert next(edit(cloud, "a pig", "a cat", **settings)).loss > 0
    with pytest.raises(InputError, match="guidance_scale: found 7.5, but .* without an empty prompt .* use 1"):
        next(edit(cloud, "a pig", "a cat", guidance_scale=7.5, **settings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_range": (0.5, 1.2)}, r"t_range: found \[0.5, 1.2\]"),
        ({"timesteps": "falling"}, "timesteps: 'falling' is not known"),
        ({"tuning": Tuning(weight="snr")}, "weight: found 'snr', expected one of uniform, sigma2"),
        ({"tuning": Tuning(weight="x0"), "guidance": "pds"}, "weight: found 'x0', but pds has weights of its own"),
        ({"tuning": Tuning(cds_weight=-1.0)}, "cds_weight: found -1.0, expected 0.0 or more"),
        ({"tuning": Tuning(pds_stride=0)}, "pds_stride: found 0, expected 1 or more"),
        ({"fpr_iters": -1}, "-1"),
        ({"fpr_lambda": -1.0}, "-1.0"),
    ],
)
def test_an_edit_names_what_is_out_of_range(options, message, cloud):
    prior = prior_of(tiny.sd)
    with pytest.raises(InputError, match=message) as error:
        next(edit(cloud, "a pig", "a cat", model=prior, steps=1, views=3, supersample=1, **options))
    assert "\n" not in str(error.value)


def test_weights_are_one_dictionary_for_all_that_have_one():
    affine = Affine()
    z, draw = normal(2, *SHAPE, seed=5), draw_at([300, 800], normal(2, *SHAPE, seed=6))
    request = affine.request(normal(2, *SHAPE, seed=7))
    factors = {"sigma2": draw.s**2, "fantasia3d": draw.a * draw.s**2, "x0": draw.s / draw.a}
    prior = type("Toy", (), {"alphas_cumprod": affine.mixture.alphas_cumprod})
    for name in ("sds", "sdi", "dds", "ids"):
        plain, *others = (
            GUIDANCE[name](affine.denoise, z, draw, request, **bind(name, prior, seeded(), Tuning(weight=weight)))
            for weight in ("uniform", *factors)
        )
        for factor, found in zip(factors.values(), others, strict=True):
            exact(found, factor * plain)
    assert PUBLISHED.keys() <= GUIDANCE.keys()
