"""The source cache: same gradients, fewer evaluations, and records that depend on their key alone."""

import pytest
import torch
from mixtures import SHAPE, Modes, exact, normal

from splatedit.diffusion import guided, repeat, scaled_linear, step_range
from splatedit.editing import view_order
from splatedit.errors import InputError
from splatedit.fpr import SOLVERS
from splatedit.guidance import GUIDANCE, dds, ids
from splatedit.posterior import dreamcatalyst, pds
from splatedit.score import Request
from splatedit.source_cache import SERVED, Record, SourceCache, digest, fingerprint, source_side
from splatedit.timesteps import edit_draw

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHAS = scaled_linear()
RANGE = (0.05, 0.95)


class Network:
    """The mixture, counting the rows that it sees."""

    def __init__(self, modes):
        self.mixture, self.rows = modes.mixture, 0

    def __call__(self, x, t, text):
        self.rows += len(x)
        return self.mixture(x, t, text)


@pytest.fixture
def modes():
    return Modes()


@pytest.fixture
def network(modes):
    return Network(modes)


@pytest.fixture
def denoise(modes, network):
    return guided(network, modes.null, 3.0)


@pytest.fixture
def z_source():
    return normal(3, *SHAPE, seed=5)


def cache_of(denoise, modes, z_source, iters=2, solver="picard_null", key="key", options=None, **limits):
    fill = source_side(denoise, modes.source, iters, solver=solver, **(options or {}))
    return SourceCache(fill, z_source, ALPHAS, RANGE, key, **limits)


def request(modes, z_source, **more):
    texts = (repeat(text, len(z_source)) for text in (modes.target, modes.source))
    return Request(*texts, z_source, **more)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("iters", [0, 3])
def test_cached_and_uncached_ids_are_bit_equal_for_the_same_record(solver, iters, denoise, modes, z_source):
    """The draw of the record, refined anew by `ids` without a cache: one view, as records are filled."""
    drawn = []

    def fill(z, draw):
        drawn.append(draw)
        return source_side(denoise, modes.source, iters, solver=solver, keep_best=True)(z, draw)

    cache = SourceCache(fill, z_source, ALPHAS, RANGE, "key")
    z = normal(1, *SHAPE, seed=4)
    for t in (200, 800):
        draw, score = cache([1], torch.tensor([t]))
        cached = ids(denoise, z, draw, request(modes, z_source[1:2], source_score=score), iters, solver=solver)
        whole = request(modes, z_source[1:2])
        uncached = ids(denoise, z, drawn[-1], whole, iters, solver=solver, keep_best=True)
        assert torch.equal(cached, uncached) and cached.abs().max() > 1e-3
        # Without safeguard both branches go through the network as one batch; the numbers stay the same.
        draw, score = cache_of(denoise, modes, z_source, iters, solver)([1], torch.tensor([t]))
        cached = ids(denoise, z, draw, request(modes, z_source[1:2], source_score=score), iters, solver=solver)
        record = []
        uncached = ids(denoise, z, drawn[-1], whole, iters, solver=solver, history=record)
        exact(draw.noise, record[0].noise, atol=1e-12)
        exact(cached, uncached, atol=1e-11)


def test_a_network_s_records_survive_the_disk_bit_for_bit(tiny_model, tmp_path):
    from splatedit.priors import load_prior

    prior = load_prior(tiny_model)
    denoise = guided(prior.denoise, prior.null(1), 3.0)
    z = torch.randn(2, prior.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    source, target = prior.text(["a cat"]), repeat(prior.text(["a pig"]), 2)
    grads = []
    for _ in range(2):  # the second finds them on disk
        fill = source_side(denoise, source, 2)
        cache = SourceCache(fill, z, prior.alphas_cumprod, RANGE, "key", folder=tmp_path)
        draw, score = cache([0, 1], torch.tensor([200, 800]))
        grads.append(ids(denoise, 1.1 * z, draw, Request(target, repeat(source, 2), z, score)))
    assert torch.equal(*grads) and cache.counts["read"] == 2 and cache.evaluations == 0
    found = dds(denoise, 1.1 * z, draw, Request(target, repeat(source, 2), z))
    torch.testing.assert_close(grads[0], found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SERVED)
def test_what_it_serves_gets_the_gradient_it_would_have_had(name, denoise, network, modes, z_source):
    cache = cache_of(denoise, modes, z_source, iters=0, solver="grad")
    draw, score = cache([0, 1, 2], torch.tensor([100, 500, 900]))
    z, options = normal(3, *SHAPE, seed=4), {} if name in ("ids", "dds") else {"alphas_cumprod": ALPHAS}
    with_cache, without = request(modes, z_source, source_score=score), request(modes, z_source)
    network.rows = 0
    cached = GUIDANCE[name](denoise, z, draw, with_cache, **options)
    assert network.rows == 2 * 3, "null and target for each view"
    if name == "ids":
        options["iters"] = 0
    exact(cached, GUIDANCE[name](denoise, z, draw, without, **options))


def test_served_names_are_guidances_that_ask_for_both_branches():
    assert set(SERVED) <= set(GUIDANCE) and {GUIDANCE[n] for n in SERVED} == {ids, dds, pds, dreamcatalyst}


# -------------------------------------------------------------------------------------------------------------- records
def test_records_are_filled_when_asked_for_and_then_kept(denoise, network, modes, z_source):
    cache = cache_of(denoise, modes, z_source)
    assert network.rows == 0
    first, _ = cache([0, 2], torch.tensor([100, 100]))
    assert network.rows == cache.evaluations == 2 * (2 + 2) and cache.backwards == 0
    again, _ = cache([2, 0], torch.tensor([300, 50]))
    assert network.rows == 8 and same(first, again.pick(torch.tensor([1, 0])))
    cache([0], torch.tensor([900]))
    assert network.rows == 12 and dict(cache.counts) == {"hits": 2, "filled": 3, "read": 0, "dropped": 0}


@pytest.mark.parametrize(
    ("solver", "iters", "spent"), [("grad", 3, (8, 6)), ("picard_null", 2, (4, 0)), ("grad", 0, (2, 0))]
)
@pytest.mark.parametrize("keep_best", [False, True])
def test_what_filling_costs_is_counted_truly(solver, iters, spent, keep_best, denoise, network, modes, z_source):
    cache = cache_of(denoise, modes, 0.1 * z_source, iters, solver, options={"keep_best": keep_best})
    cache([0], torch.tensor([200]))
    assert (cache.evaluations, cache.backwards) == spent and network.rows == cache.evaluations


@pytest.mark.parametrize("strata", [1, 2, 7, 10_000])
def test_a_record_s_step_lies_in_the_stratum_that_was_asked_for(strata, denoise, modes, z_source):
    cache = cache_of(denoise, modes, z_source, iters=0, strata=strata)
    low, high = step_range(ALPHAS, RANGE)
    seen = set()
    for t in [0, low, low + 1, 333, 500, 501, high - 1, high, 999]:
        draw, _ = cache([0], torch.tensor([t]))
        assert low <= int(draw.t) <= high and cache.stratum(int(draw.t)) == cache.stratum(t)
        seen.add(int(draw.t))
        exact(draw.a**2 + draw.s**2, torch.ones_like(draw.a))
    assert len(seen) == min(strata, len(seen)) and (strata < 7 or len(seen) >= 4)
    if strata > high - low:  # each step its own
        assert seen == {low, low + 1, 333, 500, 501, high - 1, high}


def test_strata_are_drawn_from_all_over(denoise, modes):
    cache = cache_of(denoise, modes, normal(200, *SHAPE, seed=1), iters=0, strata=2)
    draw, _ = cache(range(200), torch.tensor([60, 940]).repeat(100))
    low, high = draw.t[::2], draw.t[1::2]
    assert low.min() < 80 and 470 < low.max() <= 500 < high.min() < 530 and high.max() > 920
    assert abs(float(draw.noise.mean())) < 0.1, "picard_null without iterations leaves it white"


def test_memory_is_bounded_and_the_least_recently_used_go_first(denoise, network, modes, z_source):
    one = cache_of(denoise, modes, z_source).record(0, 0)
    assert one.bytes == 8 + 2 * 8 * one.noise.numel()
    cache = cache_of(denoise, modes, z_source, megabytes=2.5 * one.bytes / 2**20)
    t = torch.tensor([100])
    for view in (0, 1, 0, 2):  # 1 has to go
        cache([view], t)
        assert cache.bytes == sum(r.bytes for r in cache.records.values()) <= cache.room
    assert cache.counts["dropped"] == 1
    rows = network.rows
    cache([0], t), cache([2], t)
    assert network.rows == rows, "both are still there"
    back, _ = cache([1], t)
    assert network.rows > rows
    fresh, _ = cache_of(denoise, modes, z_source)([1], t)
    assert same(back, fresh), "what comes back is what was dropped"


def test_without_memory_every_use_makes_the_same_record_again(denoise, modes, z_source):
    cache = cache_of(denoise, modes, z_source, megabytes=0)
    first, again = (cache([0], torch.tensor([500])) for _ in range(2))
    assert same(first[0], again[0]) and torch.equal(first[1], again[1])
    assert cache.counts["filled"] == 2 and cache.bytes == 0


def test_refresh_gives_another_draw_after_so_many_uses(denoise, modes, z_source):
    def serve(cache):
        return [cache([0], torch.tensor([500]))[0].noise for _ in range(9)]

    found = serve(cache_of(denoise, modes, z_source, refresh=4))
    changed = [not torch.equal(a, b) for a, b in zip(found, found[1:], strict=False)]
    assert changed == [i in (3, 7) for i in range(8)], "used four times each"
    again = serve(cache_of(denoise, modes, z_source, refresh=4, megabytes=0))
    assert same(found, again)
    assert all(torch.equal(found[0], n) for n in serve(cache_of(denoise, modes, z_source)))


def test_the_record_depends_on_nothing_but_its_key(denoise, modes, z_source):
    """Not on other views, their order, or what was asked before."""
    t = torch.tensor([500])
    draw, score = cache_of(denoise, modes, z_source)([1], t)
    other = cache_of(denoise, modes, z_source.flip(0)[:2])
    other([0, 1, 0], torch.tensor([100, 900, 500]))
    found, their = other([1], t)
    assert same(draw, found) and torch.equal(score, their)


def test_on_disk_they_serve_whoever_agrees_in_everything(denoise, network, modes, z_source, tmp_path):
    folder, t = tmp_path / "a" / "cache", torch.tensor([500])
    first, _ = cache_of(denoise, modes, z_source, folder=folder)([0], t)
    assert len(list(folder.iterdir())) == 1
    network.rows = 0
    found, _ = cache_of(denoise, modes, z_source, folder=folder)([0], t)
    assert network.rows == 0 and same(first, found)
    for more in ({"key": "other"}, {"strata": 3}):
        cache = cache_of(denoise, modes, z_source, folder=folder, **more)
        cache([0], t)
        assert cache.counts["read"] == 0
    cache = cache_of(denoise, modes, z_source + 1e-9, folder=folder)
    cache([0], t)
    assert cache.counts["read"] == 0 and len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("content", [b"", b"nonsense", "cut", "other"])
def test_a_broken_file_is_made_anew(content, denoise, modes, z_source, tmp_path):
    t = torch.tensor([500])
    first, _ = cache_of(denoise, modes, z_source, folder=tmp_path)([0], t)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if content == "other":
        torch.save(Record(torch.zeros(1), torch.zeros(1), torch.zeros(1))._asdict(), file)
    else:
        file.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    cache = cache_of(denoise, modes, z_source, folder=tmp_path)
    found, _ = cache([0], t)
    assert cache.counts["read"] == 0 and same(first, found)
    assert cache_of(denoise, modes, z_source, folder=tmp_path).read(file.stem) is not None


def test_mistakes_are_named(denoise, modes, z_source, tmp_path):
    for limits, words in (
        ({"strata": 0}, "strata: found 0, expected 1 or more"),
        ({"refresh": -1}, "refresh: found -1"),
        ({"megabytes": -1.0}, "megabytes: found -1"),
    ):
        with pytest.raises(InputError, match=words):
            cache_of(denoise, modes, z_source, **limits)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cache_dir: .*file"):
        cache_of(denoise, modes, z_source, folder=tmp_path / "file")
    with pytest.raises(InputError, match="t_range: found"):
        SourceCache(source_side(denoise, modes.source), z_source, ALPHAS, (0.1, 1.5), "key")


# ----------------------------------------------------------------------------------------------------------------- keys
def test_a_digest_tells_apart_what_differs_and_nothing_else(modes):
    x = normal(2, 3, seed=1)
    parts = [x, x[0], x.float(), x.T, x + 1e-15, modes.source, modes.target, 1, 1.0, "1", None, (1, "a"), [("a", 1)]]
    assert len({digest(p) for p in parts}) == len(parts)
    assert digest(x, "a") == digest(x.clone(), "a") == digest(x.T.contiguous().T, "a") != digest("a", x)
    assert digest(1, 2) != digest(12) and digest(modes.source) == digest(modes.source._replace())
    assert digest(torch.ones(3, dtype=torch.bfloat16)) != digest(torch.ones(3, dtype=torch.float16))


def test_a_prior_s_fingerprint_changes_with_weights_schedule_and_precision(tiny_model):
    from splatedit.priors import load_prior

    prior, other = load_prior(tiny_model), load_prior(tiny_model)
    before = fingerprint(prior)
    assert fingerprint(other) == before
    with torch.no_grad():
        next(other.unet.parameters()).mul_(1.001)
    assert fingerprint(other) != before
    assert fingerprint(load_prior(tiny_model, dtype=torch.bfloat16)) != before
    prior.alphas_cumprod = prior.alphas_cumprod * 0.999
    assert fingerprint(prior) != before


def test_at_a_hit_the_history_tells_the_drift_and_one_branch(denoise, modes, z_source):
    cache, record = cache_of(denoise, modes, z_source), []
    draw, score = cache([0, 1], torch.tensor([300, 700]))
    ids(denoise, z_source[:2], draw, request(modes, z_source[:2], source_score=score), history=record)
    assert (record[0].evaluations, record[0].backwards) == (4, 0) and record[0].residuals.shape == (1, 2)
    gap = score - draw.noise
    exact(record[0].residuals[0], (draw.s / draw.a * gap).flatten(1).norm(dim=1))


def test_over_a_3d_edit_of_1000_steps_a_cached_step_costs_at_most_2_2_evaluations(denoise, network, modes):
    """48 cameras, two views a step, noise levels as an edit draws them; null text and target for each view."""
    cameras, steps, views = 48, 1000, 2
    cache = cache_of(denoise, modes, normal(cameras, *SHAPE, seed=1), iters=2, solver="picard_null")
    generator = torch.Generator().manual_seed(0)
    order = view_order(cameras, steps * views, generator).view(steps, views)
    like = torch.zeros(views, 1, 1, 1)
    for index, chosen in enumerate(order.tolist()):
        cache(chosen, edit_draw("uniform", ALPHAS, like, RANGE, generator, done=index / 999, anneal=0.5).t)
    assert cache.counts["filled"] == 2 * cameras and network.rows == cache.evaluations == 4 * 2 * cameras
    assert 2 + cache.evaluations / (steps * views) <= 2.2
