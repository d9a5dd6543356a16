"""The distiller by itself: latents in, gradients out, whatever the latents come from."""

import inspect

import pytest
import tiny_models as tiny
import torch
from mixtures import seeded

from splatedit.diffusion import guided, repeat, sample_draw
from splatedit.distilling import Distiller, Method
from splatedit.editing import edit
from splatedit.errors import InputError
from splatedit.guidance import GUIDANCE, Request
from splatedit.priors import Prior
from splatedit.tuning import bind

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(n=3):
    return torch.randn(n, 4, 8, 8, generator=seeded(1))


def test_a_method_s_defaults_are_those_of_an_edit():
    defaults = {k: p.default for k, p in inspect.signature(edit).parameters.items()}
    assert {k: defaults[k] for k in Method._fields} == Method()._asdict()


@pytest.mark.parametrize("name", ["dds", "pds", "cds", "sds"])
def test_an_answer_is_the_guidance_s_gradient_at_a_draw_of_its_own(name):
    prior, latents = Prior(tiny.sd()), pictures()
    distiller = Distiller(prior, Method(name, guidance_scale=3.0, anneal=0.0), "a pig", "a cat", latents, seeded(5))
    z = latents[[2, 0]] + 0.1
    pull = distiller(z, [2, 0])
    generator = seeded(5)
    options = bind(name, prior, generator)
    draw = sample_draw(prior.alphas_cumprod, z, (0.05, 0.95), generator)
    request = Request(*(repeat(prior.text([p]), 2) for p in ("a pig", "a cat")), latents[[2, 0]])
    expected = GUIDANCE[name](guided(prior.denoise, prior.null(), 3.0), z, draw, request, **options)
    assert torch.equal(pull.gradient, expected.detach()) and pull.fpr is None and not pull.gradient.requires_grad
    back = 2 if name == "cds" else 0
    assert distiller.backwards == back and distiller.state_dict() == {"drawn": 2, "spent": back}


@pytest.mark.parametrize("name", GUIDANCE)
def test_rows_sent_back_are_counted_as_the_networks_see_them(name):
    """Hooks on every U-Net, the LoRA's too: gradients reach either its input or, for a loss inside, its first layer."""
    from diffusers import UNet2DConditionModel

    prior, latents, seen = Prior(tiny.sd()), pictures(), []

    def watch(module, inputs, output):
        if isinstance(module, UNet2DConditionModel):
            end = inputs[0] if inputs[0].requires_grad else (output[0] if isinstance(output, tuple) else output.sample)
            if end.requires_grad:
                end.register_hook(lambda gradient: seen.append(len(gradient)))

    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        distiller = Distiller(prior, Method(name), "a pig", "a cat", latents, seeded(5))
        for _ in range(2):
            distiller(latents[:2] + 0.1, [0, 1])
    finally:
        handle.remove()
    assert distiller.backwards == sum(seen)
    assert (distiller.backwards > 0) == (name in ("ids", "cds", "vsd"))


def test_as_many_views_as_one_likes_and_the_draws_go_on():
    prior, latents = Prior(tiny.sd()), pictures()
    method = Method("dds", timesteps="stratified")
    distiller = Distiller(prior, method, "a pig", "a cat", latents, seeded(5))
    shapes = [distiller(latents[views], views, done).gradient.shape[0] for done, views in ((0, [0]), (0.5, [0, 1, 2]))]
    assert shapes == [1, 3] and distiller.drawn == 4


def test_what_ids_did_comes_along():
    prior, latents = Prior(tiny.sd()), pictures()
    distiller = Distiller(prior, Method("ids", fpr_iters=2), "a pig", "a cat", latents, seeded(5))
    pull = distiller(latents[:2], [0, 1])
    assert pull.fpr is not None and pull.fpr.residuals.shape == (3, 2)
    assert distiller.backwards == 2 * 2 * 2  # iterations, views, null and source


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Method("idz"), "guidance: 'idz' is not known"),
        (Method(solver="newton"), "solver: 'newton' is not known"),
        (Method("sds", source_cache=4), "source_cache: sds cannot use one"),
        (Method(t_range=(0.9, 0.2)), "t_range"),
        (Method(timesteps="falling"), "timesteps: 'falling'"),
    ],
)
def test_a_mistake_in_the_method_is_told_before_a_model_is_loaded(method, message):
    with pytest.raises(InputError, match=message):
        method.check()
