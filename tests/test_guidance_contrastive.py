"""CDS: the contrastive loss against numbers known by hand, its features against hooks on real diffusers networks."""

import math

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from mixtures import F64, SCALE, Modes, Seen, draw_at, exact, normal, seeded
from torch import nn

from splatedit.attention import self_attention
from splatedit.contrastive import map_size, patch_nce
from splatedit.diffusion import MixtureDenoiser, guided, repeat
from splatedit.errors import InputError
from splatedit.guidance import Request, cds, dds
from splatedit.priors import Prior

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (2, 4, 4)


# ------------------------------------------------------------------------------------------------------------- the loss
def one_hot_map():
    """Sixteen tokens at right angles to one another, on a 4x4 map."""
    return torch.eye(16, dtype=F64)[None]


def test_places_that_know_themselves_cost_as_little_as_can_be():
    """log(1 + (n - 1) exp(-1 / tau)) for tokens at right angles; 2x2 means of them are at right angles again."""
    loss = patch_nce([one_hot_map()], [one_hot_map() * 3], (4, 4), seeded(), temperature=0.5)
    expected = sum(math.log(1 + (n - 1) * math.exp(-2)) for n in (16, 4))
    assert float(loss) == pytest.approx(expected, abs=1e-12)
    worse = patch_nce([one_hot_map()], [one_hot_map().roll(1, 1)], (4, 4), seeded(), temperature=0.5)
    assert float(worse) > expected + 0.5


def test_places_that_all_look_alike_cost_the_logarithm_of_their_number():
    flat = torch.ones(1, 16, 8, dtype=F64)
    loss = patch_nce([one_hot_map()[..., :8] + 1], [flat], (4, 4), seeded())
    assert float(loss) == pytest.approx(math.log(16) + math.log(4), abs=1e-12)


def test_the_loss_written_out_place_by_place():
    """Queries are the source's places, keys those of the edit: official CDS, and the other way round than CUT."""
    old, new = (F.normalize(normal(1, 4, 8, seed=s), dim=2) for s in (1, 2))
    total = 0.0
    for i in range(4):
        likeness = [math.exp(float(old[0, i] @ new[0, j]) / 0.07) for j in range(4)]
        total -= math.log(likeness[i] / sum(likeness)) / 4
    loss = patch_nce([old], [new], (2, 2), seeded())  # the one 2x2 mean has nothing to be mistaken for
    assert float(loss) == pytest.approx(total, abs=1e-12)


def test_the_edit_alone_is_pulled():
    old, new = (normal(1, 16, 8, seed=s).requires_grad_() for s in (1, 2))
    patch_nce([old], [new], (4, 4), seeded()).sum().backward()
    assert old.grad is None and float(new.grad.norm()) > 0


def test_samples_do_not_touch_each_other():
    old, new = normal(2, 16, 8, seed=1), normal(2, 16, 8, seed=2)
    together = patch_nce([old], [new], (4, 4), seeded())
    alone = [patch_nce([old[i : i + 1]], [new[i : i + 1]], (4, 4), seeded()) for i in range(2)]
    exact(together, torch.cat(alone))


def test_places_are_drawn_from_the_generator():
    old, new = normal(1, 16, 8, seed=1), normal(1, 16, 8, seed=2)
    first, again, other = (patch_nce([old], [new], (4, 4), seeded(s), patches=5) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_maps_of_every_depth_and_shape():
    assert map_size(64 * 64, (64, 64)) == (64, 64) and map_size(48 * 32, (96, 64)) == (48, 32)
    assert map_size(5 * 4, (10, 7)) == (5, 4) and map_size(1, (8, 8)) == (1, 1)
    with pytest.raises(AssertionError):
        map_size(7, (8, 8))
    layers = [normal(1, n, 8, seed=n) for n in (20, 6, 1)]  # of latents 10x7: 5x4, 3x2, 1x1
    assert patch_nce(layers, layers, (10, 7), seeded()).isfinite().all()


# ------------------------------------------------------------------------------------------------------- the guidance
class Pictures(Modes):
    """The bent scores of Modes, on maps large enough for patches, seen by a recording network."""

    def __init__(self):
        size = math.prod(SHAPE)
        directions = torch.linalg.qr(normal(4, size, 2, seed=3)).Q
        variances = torch.rand(4, 2, dtype=F64, generator=seeded(4))
        self.mixture = MixtureDenoiser(0.6 * normal(4, *SHAPE, seed=2), None, 0.1, directions, variances)
        texts = ([0.4, 0.1, 0.1, 0.4], [0.8, 0.2, 0, 0], [0, 0, 0.2, 0.8])
        self.null, self.source, self.target = (self.mixture.text(row) for row in texts)
        self.network = Seen(self.mixture)
        self.denoise = guided(self.network, self.null, SCALE)


@pytest.fixture
def pictures():
    return Pictures()


def arguments(pictures, b=2):
    z, z_source = normal(b, *SHAPE, seed=5), normal(b, *SHAPE, seed=6)
    draw = draw_at([300, 700][:b], normal(b, *SHAPE, seed=7))
    return z, draw, pictures.request(z_source)


@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_the_gradient_is_dds_and_that_of_the_loss(scale, pictures):
    z, draw, request = arguments(pictures)
    denoise = pictures.denoise._replace(scale=scale)
    grad = cds(denoise, z, draw, request, record=pictures.network.self_attention, generator=seeded(), contrast=5.0)
    edited = z.clone().requires_grad_()
    features = []
    for x, text in ((request.z_source, request.source), (edited, request.target)):
        with pictures.network.self_attention() as seen:
            pictures.network(draw.noised(x), draw.t, text)
        features.append(seen)
    patch_nce(features[0], features[1], (4, 4), seeded()).sum().backward()
    exact(grad, dds(denoise, z, draw, request) + 5.0 * 16 / 2000 * edited.grad)
    assert edited.grad.norm() > 1e-3 and not pictures.network.lists


def test_without_contrast_it_is_dds(pictures):
    z, draw, request = arguments(pictures)
    grad = cds(
        pictures.denoise, z, draw, request, record=pictures.network.self_attention, generator=seeded(), contrast=0.0
    )
    assert torch.equal(grad, dds(pictures.denoise, z, draw, request))


def test_a_source_score_that_is_known_changes_nothing(pictures):
    z, draw, request = arguments(pictures)
    score = pictures.denoise(draw.noised(request.z_source), draw.t, request.source)
    grads = [
        cds(pictures.denoise, z, draw, asked, record=pictures.network.self_attention, generator=seeded())
        for asked in (request, request._replace(source_score=score))
    ]
    exact(grads[0], grads[1])


def test_it_runs_without_gradients_around_it_and_leaves_none_behind(pictures):
    z, draw, request = arguments(pictures)
    with torch.no_grad():
        grad = cds(pictures.denoise, z, draw, request, record=pictures.network.self_attention, generator=seeded())
    assert not grad.requires_grad and grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------- the features
class Wrapped(nn.Module):
    """A processor that is a module with weights of its own, as adapters bring along."""

    def __init__(self, processor):
        super().__init__()
        self.inner, self.gain = processor, nn.Parameter(torch.ones(()))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return self.gain * self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def networks():
    from diffusers.models.attention_processor import AttnProcessor

    plain, own, weighted = tiny.sd().unet, tiny.sd().unet, tiny.sd().unet
    own.set_attn_processor(AttnProcessor())
    weighted.set_attn_processor({name: Wrapped(p) for name, p in weighted.attn_processors.items()})
    return {"sd": plain, "attention written out": own, "processors with weights": weighted, "sdxl": tiny.sdxl().unet}


def run(unet, b=2):
    x = torch.randn(b, 4, 8, 8, generator=seeded(1))
    text = torch.randn(b, 7, unet.config.cross_attention_dim, generator=seeded(2))
    more = None
    if unet.config.addition_embed_type == "text_time":
        more = {"text_embeds": torch.zeros(b, 32), "time_ids": torch.zeros(b, 6)}
    return unet(x, torch.tensor([500] * b), encoder_hidden_states=text, added_cond_kwargs=more).sample


@pytest.mark.parametrize("name", ["sd", "attention written out", "processors with weights", "sdxl"])
def test_features_are_what_the_layers_put_out_and_the_network_stays_as_it_was(name):
    unet = networks()[name]
    before, expected = unet.attn_processors, []
    layers = [m for n, m in unet.up_blocks.named_modules() if n.endswith("attn1")]
    hooks = [m.register_forward_hook(lambda m, i, o: expected.append(o)) for m in layers]
    output = run(unet)
    for hook in hooks:
        hook.remove()
    with self_attention(unet) as features:
        recorded = run(unet)
        run(unet)
    assert torch.equal(output, recorded)
    assert len(layers) == len(expected) > 0 and len(features) == 2 * len(layers)
    for found, wanted in zip(features, expected, strict=False):
        assert torch.equal(found, wanted) and found.shape[:2] == (2, 16)
    after = unet.attn_processors
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    assert torch.equal(run(unet), output)


def test_nothing_stays_behind_after_an_exception():
    unet = tiny.sd().unet
    before = unet.attn_processors
    with pytest.raises(KeyError), self_attention(unet):
        assert all(before[k] is not p for k, p in unet.attn_processors.items() if "up_blocks" in k and "attn1" in k)
        raise KeyError
    assert all(before[k] is p for k, p in unet.attn_processors.items())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(m, kind) for m in unet.modules() for kind in hooks)


def test_a_network_without_self_attention_there_is_told():
    unet = tiny.unet(up_block_types=("UpBlock2D", "UpBlock2D"))
    with pytest.raises(InputError, match="no self-attention in its up_blocks"), self_attention(unet):
        pass


def test_checkpointing_spends_another_pass_and_gives_the_same_gradient():
    grads = []
    for checkpointing in (False, True):
        prior = Prior(tiny.sd())
        if checkpointing:
            prior.unet.enable_gradient_checkpointing()
        z = torch.randn(2, 4, 8, 8, generator=seeded(1))
        draw = draw_at([300, 700], torch.randn(2, 4, 8, 8, generator=seeded(2)))
        request = Request(*(repeat(prior.text([p]), 2) for p in ("a pig", "a cat")), 0.9 * z)
        denoise = guided(prior.denoise, prior.null(), 7.5)
        grads.append(cds(denoise, z, draw, request, record=prior.self_attention, generator=seeded()))
        plain = dds(denoise, z, draw, request)
        assert (grads[-1] - plain).norm() > 1e-4 * plain.norm()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)


def test_normalised_features_are_means_over_squares():
    from splatedit.contrastive import pooled

    layer = normal(1, 16, 3, seed=1)
    square = layer[0, [0, 1, 4, 5]].mean(0)
    exact(pooled(layer, 4, 4, 2)[0, 0], F.normalize(square, dim=0))
