"""VSD: its formula with denoisers that are known, its LoRA on real diffusers networks."""

import copy
import sys

import pytest
import tiny_models as tiny
import torch
from mixtures import SHAPE, Modes, draw_at, exact, normal, seeded

from splatedit.diffusion import Draw, guided, repeat, scaled_linear, scales, to_eps_x0
from splatedit.distilling import Method
from splatedit.editing import edit
from splatedit.errors import InputError
from splatedit.guidance import Request, sds, vsd
from splatedit.priors import Prior, load_prior
from splatedit.variational import LoraDenoiser, output_share

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------------------- the formula
class Known:
    """A particle with a given answer, which keeps what it was taught."""

    def __init__(self, answer):
        self.answer, self.taught = answer, []

    def __call__(self, x, t, text, camera):
        return self.answer(x, t, text)

    def learn(self, z, text, camera, generator):
        self.taught.append((z, text, camera))
        return 0.0


@pytest.mark.parametrize("weight", ["sigma2", "uniform"])
def test_a_particle_that_says_the_noise_makes_it_sds_and_one_that_agrees_makes_it_zero(weight):
    modes, z = Modes(), normal(2, *SHAPE, seed=5)
    draw, request = draw_at([300, 800], normal(2, *SHAPE, seed=6)), modes.request(z)
    noise, same = Known(lambda *_: draw.noise), Known(modes.denoise)
    exact(
        vsd(modes.denoise, z, draw, request, particle=noise, generator=seeded(), weight=weight),
        sds(modes.denoise, z, draw, request, weight=weight),
    )
    exact(vsd(modes.denoise, z, draw, request, particle=same, generator=seeded(), weight=weight), torch.zeros_like(z))


def test_the_particle_is_taught_the_renders_once_a_step():
    modes, z = Modes(), normal(2, *SHAPE, seed=5).requires_grad_()
    camera, particle = normal(2, 16, seed=8), Known(modes.denoise)
    request = modes.request(normal(2, *SHAPE, seed=7))._replace(camera=camera)
    vsd(
        modes.denoise, z, draw_at([300, 800], normal(2, *SHAPE, seed=6)), request, particle=particle, generator=seeded()
    )
    ((renders, text, view),) = particle.taught
    assert torch.equal(renders, z) and not renders.requires_grad and text is request.target and view is camera


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_error_of_the_network_s_own_output_is_what_is_trained(prediction):
    x, outputs = normal(3, *SHAPE, seed=1), normal(2, 3, *SHAPE, seed=2)
    t = torch.tensor([50, 500, 950])
    draw = Draw(t, *scales(scaled_linear(), t, x), x)
    gap = [to_eps_x0(output, x, draw.a, draw.s, prediction)[0] for output in outputs]
    exact((output_share(draw, prediction) * (gap[0] - gap[1])).abs(), (outputs[0] - outputs[1]).abs(), atol=1e-11)


# ------------------------------------------------------------------------------------------------------------- the LoRA
def latents(b=2, seed=1):
    return torch.randn(b, 4, 8, 8, generator=seeded(seed))


def request_of(prior, b=2):
    texts = (repeat(prior.text([p]), b) for p in ("a pig", "a cat"))
    return Request(*texts, latents(b, 9), camera=torch.randn(b, 16, generator=seeded(8)))


def ask(particle, prior, b=2, camera=True):
    request = request_of(prior, b)
    with torch.no_grad():
        return particle(latents(b), torch.tensor([300, 700][:b]), request.target, request.camera if camera else None)


@pytest.mark.parametrize("pipeline", [tiny.sd, tiny.sdxl])
def test_it_starts_as_the_prior_and_shares_its_weights(pipeline):
    prior = Prior(pipeline())
    before = dict(prior.unet.named_modules())
    plain = prior.denoise(latents(), torch.tensor([300, 700]), request_of(prior).target)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    particle = LoraDenoiser(prior, seeded())
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator is not touched"
    torch.testing.assert_close(ask(particle, prior), plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(ask(particle, prior, camera=False), plain, rtol=0, atol=1e-6)
    shared = {id(p) for p in prior.unet.parameters()}
    own = sum(p.numel() for p in particle.unet.parameters() if id(p) not in shared)
    assert own == sum(p.numel() for p in particle.weights.values()) > 0
    attentions = len(prior.unet.attn_processors)
    assert sum("lora_A" in name for name in particle.weights) == 4 * attentions
    after = dict(prior.unet.named_modules())
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    assert not any(p.requires_grad for p in prior.unet.parameters()) and prior.unet.class_embedding is None


def train(particle, prior, steps, generator, z=None):
    request = request_of(prior)
    z = latents(seed=3) if z is None else z
    return [particle.learn(z, request.target, request.camera, generator) for _ in range(steps)]


def test_it_learns_the_renders_and_the_prior_does_not():
    """Renders that the bundled model has never seen: white noise, one for each of two cameras."""
    prior = load_prior("pocket")
    weights = copy.deepcopy(prior.unet.state_dict())
    particle, generator = LoraDenoiser(prior, seeded(), rate=2e-3), seeded(4)
    z, camera = torch.randn(2, 4, 16, 16, generator=seeded(1)), torch.randn(2, 16, generator=seeded(8))
    text = repeat(prior.text(["a pig"]), 2)

    def miss(denoise):
        generator, total = seeded(7), 0.0
        for k in (200, 500, 800):
            t = torch.tensor([k, k])
            draw = Draw(t, *scales(prior.alphas_cumprod, t, z), torch.randn(z.shape, generator=generator))
            with torch.no_grad():
                total += float((denoise(draw.noised(z), t) - draw.noise).square().mean()) / 3
        return total

    before = miss(lambda x, t: particle(x, t, text, camera))
    for _ in range(20):
        particle.learn(z, text, camera, generator)
    after, swapped = (miss(lambda x, t, c=c: particle(x, t, text, c)) for c in (camera, camera.flip(0)))
    assert miss(lambda x, t: prior.denoise(x, t, text)) == pytest.approx(before, rel=1e-5)
    assert after < 0.75 * before and swapped != after, "it has learnt the renders, and hears the camera"
    assert all(torch.equal(v, weights[k]) for k, v in prior.unet.state_dict().items())


def test_a_generator_decides_everything():
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + len(answers))
        prior, generator = Prior(tiny.sd()), seeded(seed)
        particle = LoraDenoiser(prior, generator, rate=1e-2)
        train(particle, prior, 3, generator)
        answers.append(ask(particle, prior))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    prior, generator = Prior(tiny.sd()), seeded(1)
    particle = LoraDenoiser(prior, generator, rate=1e-2)
    train(particle, prior, 3, generator)
    torch.save({"particle": particle.state_dict(), "generator": generator.get_state()}, tmp_path / "state.pt")
    train(particle, prior, 2, generator)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other, generator = LoraDenoiser(prior, seeded(99), rate=1e-2), seeded()
    other.load_state_dict(state["particle"])
    generator.set_state(state["generator"])
    train(other, prior, 2, generator)
    assert torch.equal(ask(particle, prior), ask(other, prior))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pipeline", [tiny.sd, tiny.sdxl])
def test_it_trains_in_single_precision_on_a_half_precision_network(pipeline, dtype):
    prior, single = Prior(pipeline(), dtype=dtype), Prior(pipeline())
    steps = []
    for p in (prior, single):
        particle = LoraDenoiser(p, seeded(), rate=1e-3)
        assert {w.dtype for w in particle.weights.values()} == {torch.float32}
        before = {k: w.detach().clone() for k, w in particle.weights.items()}
        train(particle, p, 1, seeded(4))
        grads = torch.cat([w.grad.flatten() for w in particle.weights.values()])
        steps.append(grads)
        assert any(not torch.equal(w, before[k]) for k, w in particle.weights.items())
    assert steps[0].dtype == torch.float32 and steps[0].isfinite().all()
    assert (steps[0] - steps[1]).norm() < 10 * torch.finfo(dtype).eps * steps[1].norm()


def test_an_overflow_costs_one_step_of_training(monkeypatch):
    prior = Prior(tiny.sd())
    particle = LoraDenoiser(prior, seeded())
    before = {k: w.detach().clone() for k, w in particle.weights.items()}
    train(particle, prior, 1, seeded(4), z=torch.full((2, 4, 8, 8), float("inf")))
    assert all(torch.equal(w, before[k]) for k, w in particle.weights.items())


def test_checkpointing_the_network_trains_the_same():
    answers = []
    for checkpointing in (False, True):
        prior = Prior(tiny.sd())
        if checkpointing:
            prior.unet.enable_gradient_checkpointing()
        particle = LoraDenoiser(prior, seeded(), rate=1e-3)
        train(particle, prior, 3, seeded(4))
        answers.append(ask(particle, prior))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-6)


def test_evaluations_and_the_gradient_of_a_step():
    prior = Prior(tiny.sd())
    particle, request = LoraDenoiser(prior, seeded()), request_of(prior)
    draw = draw_at([300, 700], latents(seed=2))
    denoise = guided(prior.denoise, prior.null(), 3.0)
    with torch.no_grad():
        grad = vsd(denoise, latents(), draw, request, particle=particle, generator=seeded())
        assert prior.evaluations == 2 * (2 + 1 + 1)
        x = draw.noised(latents())
        told, plain = (denoise._replace(scale=w)(x, draw.t, request.target) for w in (3.0, 1.0))
    assert not grad.requires_grad
    torch.testing.assert_close(grad, draw.s**2 * (told - plain), rtol=1e-4, atol=1e-5)


def test_an_edit_trains_it_along_and_its_state_is_in_the_checkpoint(cloud, tmp_path):
    prior = Prior(tiny.sd())
    settings = {"model": prior, "guidance": "vsd", "views": 3, "supersample": 1, "neighbours": 0}
    *_, last = edit(cloud, "a pig", "a cat", steps=3, **settings)
    *_, again = edit(cloud, "a pig", "a cat", steps=3, **settings)
    assert torch.equal(last.gaussians.sh0, again.gaussians.sh0)
    torch.save(last.state(), tmp_path / "last.pt")
    state = torch.load(tmp_path / "last.pt", weights_only=True)["particle"]
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {3}
    assert any("lora_B" in name and float(value.abs().max()) > 0 for name, value in state["weights"].items())


def test_without_peft_and_with_class_labels_one_is_told(monkeypatch):
    prior = Prior(tiny.sd())
    prior.unet.class_embedding = torch.nn.Identity()
    with pytest.raises(InputError, match="has class labels where the camera would go"):
        LoraDenoiser(prior, seeded())
    prior.unet.class_embedding = None
    monkeypatch.setitem(sys.modules, "peft", None)
    for ask in (lambda: LoraDenoiser(prior, seeded()), Method("vsd").check):
        with pytest.raises(InputError, match=r'peft is missing; pip install "splatedit\[vsd\]"'):
            ask()
