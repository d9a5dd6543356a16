# %% [markdown]
# # What a score says: noise, Tweedie, CFG
#
# splatedit changes a 3D scene by asking a text-to-image diffusion model, again and again, what it thinks of pictures of
# the scene. The model answers one kind of question only: *here is a picture under noise, and a text; which part of it
# is noise?* This notebook asks that question by hand, and shows how the answer is read:
#
# 1. a picture becomes **latents**, and latents are put under **noise**;
# 2. the **predicted noise** is a direction in the space of pictures, the *score*;
# 3. **Tweedie's formula** turns it into the picture that the model takes the noise for, the *posterior mean*;
# 4. where the score is **known exactly**, all of this can be checked;
# 5. what a **text** changes, and what **classifier-free guidance** does with that.
#
# Nothing is learnt here, nothing is downloaded, and it all runs in about a minute on a laptop. The model is `pocket`,
# 6.5 million parameters, which come with splatedit. It knows 24 toy animals and nothing else, so its pictures are
# coarse; the formulas are those of Stable Diffusion, which takes its place by changing one word.

# %%
import matplotlib.pyplot as plt
import torch

import splatedit
from splatedit import figures
from splatedit.diagnostics import Rows
from splatedit.diffusion import MixtureDenoiser, denoising_errors, guided, repeat, with_noise
from splatedit.points import moons
from splatedit.priors import load_prior
from splatedit.sizes import size

torch.set_grad_enabled(False)  # nothing is optimised here
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## 1. A picture, as the model sees it
#
# One of the bundled scenes, drawn from one camera.

# %%
scene = splatedit.load("../scenes/cat.ply")
scene

# %%
prior = load_prior("pocket")
camera = splatedit.orbit(scene, 1, azimuth=30, elevation=18, size=prior.image_size)
picture = splatedit.render.render(scene, camera).rgb.clamp(0, 1)  # (1, 3, 128, 128)
z = prior.encode(picture)  # (1, 4, 16, 16)
print(f"{picture.numel()} numbers in the picture, {z.numel()} in its latents")

# %% [markdown]
# The model does not work on pixels. An autoencoder first presses the picture into **latents**: 16 x 16 places with 4
# numbers each. They are scaled so that their size is about 1, the size of the noise to come. What the decoder makes of
# them again is the best picture that any edit of latents could show:

# %%
figures.strips({"": torch.cat([picture, prior.decode(z)])}, ["the scene", "encoded and decoded"])

# %% [markdown]
# The four channels of the latents mean nothing to the eye, but they are still a picture: each place of the 16 x 16
# belongs to 8 x 8 pixels.

# %%
figures.strips({"z": z[0]}, [f"channel {i}" for i in range(4)])

# %% [markdown]
# ## 2. Noise
#
# Noised latents at step $t$ of the schedule are a mixture of the latents and of white noise $\epsilon$,
#
# $$x_t = a_t\, z + s_t\, \epsilon, \qquad a_t = \sqrt{\bar\alpha_t}, \quad s_t = \sqrt{1 - \bar\alpha_t},
# \qquad \epsilon \sim \mathcal N(0, 1).$$
#
# As $a_t^2 + s_t^2 = 1$, the mixture always has size 1. The numbers $\bar\alpha_t$ are a table that belongs to the
# model, `prior.alphas_cumprod`. It is the table of Stable Diffusion.

# %%
alphas = prior.alphas_cumprod
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
left.plot(alphas.sqrt(), label="$a_t$, share of the picture")
left.plot((1 - alphas).sqrt(), label="$s_t$, share of the noise")
right.semilogy((1 - alphas).sqrt() / alphas.sqrt(), color="black")
right.set_title("$s_t / a_t$: noise for one part of picture", fontsize=10)
left.legend()
[axes.set_xlabel("step $t$") for axes in (left, right)]
plt.show()

# %% [markdown]
# `with_noise` draws the noise and remembers $t$, $a_t$ and $s_t$ with it; `draw.noised(z)` is the formula above. Every
# row of a batch has a step of its own, so that one call noises the same cat in five ways.

# %%
steps = [100, 300, 500, 700, 900]
names = [f"t = {t}" for t in steps]
cats = z.expand(len(steps), -1, -1, -1)  # the same latents five times
draw = with_noise(alphas, torch.tensor(steps), cats, generator)
x = draw.noised(cats)  # a z + s noise

figures.strips({"$x_t$, decoded": prior.decode(x)}, names)

# %% [markdown]
# From $t = 500$ on the eye finds little. (The decoder has never been shown noise; these pictures are only there to be
# looked at.)
#
# ## 3. The answer: predicted noise
#
# Now the question. A text becomes numbers by `prior.text`, and `prior.denoise` is the model: it takes $x_t$, $t$ and a
# text for every row, and answers with the noise that it sees, $\hat\epsilon(x_t, t, y)$.

# %%
cat = prior.text(["a cat"])
ehat = prior.denoise(x, draw.t, repeat(cat, len(x)))

rows = {"noise": draw.noise[:, 0], "predicted": ehat[:, 0], "rest": (draw.noise - ehat)[:, 0]}
figures.strips(rows, names)


# %% [markdown]
# (First channel; each map has its own scale.) The prediction looks like the noise at every step. What it misses is in
# the third row: there the cat shows through, for where the picture has its details, picture and noise are hard to tell
# apart. In numbers:


# %%
def rms(values):
    """Root of the mean square of each row."""
    return values.square().flatten(1).mean(1).sqrt()


error = rms(ehat - draw.noise)
Rows({"t": t, "rms of noise - predicted": float(e)} for t, e in zip(steps, error, strict=True))

# %% [markdown]
# The heavier the noise, the better it is found. That is less than it seems: at $t = 900$ nearly everything in $x_t$
# *is* noise. What counts for an edit is not how much noise is found but what of the picture is left, below.
#
# ### Why it is called a score
#
# Think of all noised pictures of cats as a cloud with density $p_t(x)$. A model trained to predict noise has learnt the
# slope of that density: the direction in which noised pictures become more probable, called the **score**,
#
# $$\nabla_x \log p_t(x) = -\,\hat\epsilon(x, t) / s_t .$$
#
# To subtract predicted noise is to climb towards what is probable. Section 5 checks this where $p_t$ is known.
#
# ## 4. Tweedie's formula: what the model takes the noise for
#
# If $x_t = a_t z + s_t\epsilon$ and we believe the predicted noise, we can solve for the picture:
#
# $$\hat z(x_t) = \frac{x_t - s_t\, \hat\epsilon(x_t)}{a_t} = \mathbb E\,[\,z \mid x_t\,].$$
#
# The right side is **Tweedie's formula**: for the ideal $\hat\epsilon$ this is exactly the *mean of all pictures that
# could be behind* $x_t$, each counted as often as it is probable. It is called the posterior mean, and it is the one
# thing to remember from this notebook.


# %%
def posterior_mean(x, draw, ehat):
    return (x - draw.s * ehat) / draw.a


zhat = posterior_mean(x, draw, ehat)
figures.strips({"$x_t$": prior.decode(x), r"$\hat z(x_t)$": prior.decode(zhat)}, names)

# %% [markdown]
# With a little noise the cat comes back whole. With more it loses its face, then its ears and its tail, and at $t =
# 900$ a dark blob in the middle is all that is left. **That blur is the right answer.** When the noise hides where the
# eyes are, the mean of all cats that could be there has smeared eyes. A posterior mean is not a guess of one picture,
# it is what all guesses have in common.
#
# How far is it from the cat that we started with? By the formulas, the error of the predicted noise comes back
# magnified, $z - \hat z = \frac{s_t}{a_t}(\hat\epsilon - \epsilon)$, which is why 0.08 of error at $t = 900$ is far
# more than 0.45 at $t = 100$:

# %%
distance = (z - zhat).flatten(1).norm(dim=1)
magnified = (draw.s / draw.a * (ehat - draw.noise)).flatten(1).norm(dim=1)
drift = distance / z.norm()
print("largest difference of the two sides:", f"{(distance - magnified).abs().max():.0e}")
Rows(
    {"t": t, "s / a": float(s / a), "drift": float(d)} for t, a, s, d in zip(steps, draw.a, draw.s, drift, strict=True)
)

# %% [markdown]
# The share $|z - \hat z| / |z|$ is called **posterior-mean drift** in splatedit. It is the subject of notebook 04: an
# edit compares what the model sees in two noised pictures, and when it does not even find the source in the noised
# source, something of the source is lost.
#
# ## 5. Where the answer is known
#
# Is Tweedie's formula true? With a network one can only hope. So let us take a "model" without a network: if clean data
# are a **mixture of Gaussians**, then noised data are one as well, and the ideal $\hat\epsilon$ is a formula.
# `MixtureDenoiser` is that formula, and takes the place of `prior.denoise` everywhere in splatedit.
#
# ### One number
#
# Data in one dimension: 70 % near $-1$, 30 % near $+1$.

# %%
centres, weights, width = torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.tensor([0.7, 0.3]), 0.2
toy = MixtureDenoiser(centres.view(2, 1, 1, 1), floor=width**2)
line = torch.linspace(-2.5, 2.5, 401, dtype=torch.float64)


def ask(denoiser, points, t, weights):
    """Exact ehat and posterior mean at points (n, d), all at step t."""
    x, at = points[..., None, None], torch.full((len(points),), t)
    nothing = with_noise(denoiser.alphas_cumprod, at, x, generator)  # only its a and s are used
    ehat = denoiser(x, at, repeat(denoiser.text(weights), len(x)))
    return ehat[..., 0, 0], posterior_mean(x, nothing, ehat)[..., 0, 0], float(nothing.a[0]), float(nothing.s[0])


# %% [markdown]
# Two checks. The score: $-\hat\epsilon/s_t$ against the slope of $\log p_t$, by finite differences. The posterior mean:
# Tweedie's formula against Bayes' rule, a sum over all $z$ of how probable $z$ is times how probable it makes $x$.


# %%
def density(z, a=1.0, s=0.0):
    """Of data under noise, up to a factor; a = 1 and s = 0 is the data itself."""
    spread = a**2 * width**2 + s**2
    return (weights * (-((z[:, None] - a * centres) ** 2) / (2 * spread)).exp()).sum(1)


figure, panels = plt.subplots(2, 3, figsize=(9, 4.6), sharex=True, layout="constrained")
for t, (above, below) in zip((100, 400, 950), panels.T, strict=True):
    e, mean, a, s = ask(toy, line[:, None], t, weights)
    slope = torch.gradient(density(line, a, s).log(), spacing=(line,))[0]
    likely = density(line) * (-((line[:, None] - a * line) ** 2) / (2 * s**2)).exp()  # (x, z): p(z) p(x | z)
    bayes = (likely * line).sum(1) / likely.sum(1)
    above.fill_between(line, density(line, a, s) / density(line, a, s).max() * 4 - 10, -10, color="0.9")
    above.plot(line, slope, color="C0", lw=4, alpha=0.4, label=r"slope of $\log p_t$")
    above.plot(line, -e[:, 0] / s, color="black", lw=1, label=r"$-\hat\epsilon / s_t$")
    below.plot(line, bayes, color="C1", lw=4, alpha=0.4, label="Bayes' rule")
    below.plot(line, mean[:, 0], color="black", lw=1, label="Tweedie")
    above.set(title=f"t = {t}", ylim=(-10, 10))
    below.set(xlabel="$x_t$", ylim=(-1.6, 1.6))
    print(f"t = {t}: the posterior means differ by at most {(bayes - mean[:, 0]).abs().max():.0e}")
panels[0][0].set_ylabel("score")
panels[1][0].set_ylabel("posterior mean")
panels[0][0].legend(fontsize=8)
panels[1][0].legend(fontsize=8)
plt.show()

# %% [markdown]
# Black lies on colour everywhere: both formulas hold. (Grey: the density of noised data.) And the lower row shows what
# noise does to the posterior mean. At $t = 100$ it is a step: whatever $x_t$ is, the model knows which of the two heaps
# it came from. At $t = 950$ it is nearly a flat line at $-0.4$, the mean of all data: $x_t$ says next to nothing any
# more. Hardly any data lie near $-0.4$. Pictures are no different: a cat under heavy noise is answered by the mean of
# all cats, which is no cat.
#
# ### Two numbers
#
# The same in the plane, where scores are arrows. Data lie on two half moons; notebook 03 uses them to compare the
# guidances.

# %%
plane = moons()
both = tuple(r + b for r, b in zip(plane.red, plane.blue, strict=True))
grid = torch.cartesian_prod(*[torch.linspace(-2, 2, 13, dtype=torch.float64)] * 2)
data = torch.cat([plane.sample(weights, 150, generator) for weights in (plane.red, plane.blue)])

figure, panels = plt.subplots(2, 3, figsize=(9, 6.2), sharex=True, sharey=True, layout="constrained")
for t, (above, below) in zip((50, 300, 800), panels.T, strict=True):
    e, mean, a, s = ask(plane.denoiser, grid, t, both)
    noised = a * data + s * torch.randn(data.shape, generator=generator, dtype=data.dtype)
    above.plot(*noised.T, ".", ms=3, color="0.75")
    above.quiver(*grid.T, *(-e / s).T, color="C0", width=0.007, headwidth=4)
    seen = ask(plane.denoiser, noised, t, both)[1]
    below.plot(*data.T, ".", ms=3, color="0.75")
    below.plot(*seen.T, ".", ms=3, color="C1")
    above.set(title=f"t = {t}", xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    below.set_aspect("equal")
panels[0][0].set_ylabel("noised data and score")
panels[1][0].set_ylabel("data and posterior means")
plt.show()

# %% [markdown]
# Upper row: the score points from everywhere to where noised data are. Lower row: what the (perfect) model sees in 300
# noised points. At $t = 50$ it finds the moons again; at $t = 300$ the means have drawn together, between what the
# points might have been; at $t = 800$ all of them say nearly the same. So even a perfect model does not find the source
# again: drift is no defect of the network. How much is lost can be foretold: the expected squared error of the
# posterior mean is the posterior's variance, which `posterior` gives exactly.

# %%
few, many = [50, 200, 400, 600, 800, 950], size(4000, quick=500)
texts = repeat(plane.denoiser.text(both), many)
table = Rows()
for t in few:
    points = torch.cat([plane.sample(weights, many // 2, generator) for weights in (plane.red, plane.blue)])[
        ..., None, None
    ]
    one = with_noise(plane.denoiser.alphas_cumprod, torch.full((many,), t), points, generator)
    mean, covariance = plane.denoiser.posterior(one.noised(points), one.t, texts)
    found = (points - mean).square().flatten(1).sum(1).mean()
    foretold = covariance.diagonal(dim1=1, dim2=2).sum(1).mean()
    table.append({"t": t, "squared error, measured": float(found), "foretold": float(foretold)})
table

# %% [markdown]
# ## 6. What a text changes
#
# Back to the cat. The same noised latents, three texts: the **source** "a cat", the **target** "a pig", and the **null
# text**, the empty prompt, which the model was also trained with and which means *any picture at all*.

# %%
null, pig = prior.null(), prior.text(["a pig"])
answers = {
    name: prior.denoise(x, draw.t, repeat(text, len(x))) for name, text in (("null", null), ("cat", cat), ("pig", pig))
}
figures.strips({name: prior.decode(posterior_mean(x, draw, e)) for name, e in answers.items()}, names)

# %% [markdown]
# At $t = 100$ and 300 the three nearly agree: so little noise leaves no doubt about what is in the picture. At $t =
# 500$ and 700 the texts fill in what the noise has hidden, grey for a cat, pink for a pig, and the null text something
# of both. That is Bayes' rule once more,
#
# $$\nabla_x \log p_t(x \mid y) = \nabla_x \log p_t(x) + \nabla_x \log p_t(y \mid x)
# \quad\Longrightarrow\quad \hat\epsilon_y - \hat\epsilon_\varnothing = -s_t\, \nabla_x \log p_t(y \mid x).$$
#
# The *difference* between the answers for a text and for no text is the direction in which the picture would look more
# like the text. Where in the picture do they differ?

# %%
differences = {"cat - null": ("cat", "null"), "pig - null": ("pig", "null"), "pig - cat": ("pig", "cat")}
maps = {name: (answers[a] - answers[b]).norm(dim=1) for name, (a, b) in differences.items()}
figures.strips(maps, names)

# %% [markdown]
# On the animal, not beside it. "pig - cat" at low noise is about eyes and snout, which tell the two apart when the rest
# is still to be seen, and at high noise about the whole body. Each map has its own scale, for the differences are
# small, smaller than the error of any of the answers:

# %%
table = Rows()
for i, t in enumerate(steps):
    row = {name: float(rms(answers[a] - answers[b])[i]) for name, (a, b) in differences.items()}
    wrong = torch.stack([answers[name][i] - draw.noise[i] for name in ("cat", "pig")]).flatten(1)
    both_errors = {"error of cat": float(error[i]), "correlation with that of pig": float(wrong.corrcoef()[0, 1])}
    table.append({"t": t, **row, **both_errors})
table

# %% [markdown]
# **What a text says is quieter than the error.** Whoever moves a picture along $\hat\epsilon_{pig} - \epsilon$ mostly
# follows the error. But the errors of two answers to the *same noise* are nearly the same (last column), and cancel in
# $\hat\epsilon_{pig} - \hat\epsilon_{cat}$. The whole family DDS, PDS, IDS lives on this; notebook 03 takes it apart.
#
# Can the model at least tell what it is looking at? The text under which the noise is predicted best wins; that is all
# of a "diffusion classifier". `denoising_errors` asks with the same noise for every text.

# %%
prompts = list(prior.vocabulary)
errors = denoising_errors(
    prior.denoise, z, [prior.text([p]) for p in prompts], alphas, generator, draws=size(12, quick=4)
)[0]
order = errors.argsort().tolist()
figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
axes.plot([prompts[i] for i in order], errors[order], "o", color="0.5")
axes.plot("a cat", errors[prompts.index("a cat")], "o", color="C1", ms=9)
axes.tick_params(axis="x", rotation=60)
axes.set_ylabel("error of the noise")
plt.show()

# %% [markdown]
# It finds the cat, by a small margin over other grey animals. (One view of one scene, so no proof that it always does.)
#
# ## 7. Classifier-free guidance
#
# If the difference to the null text is the direction towards the text, why not go further that way? **Classifier-free
# guidance** with scale $w$ does,
#
# $$\hat\epsilon_w = \hat\epsilon_\varnothing + w\,(\hat\epsilon_y - \hat\epsilon_\varnothing),
# \qquad\text{and so}\qquad \hat z_w = \hat z_\varnothing + w\,(\hat z_y - \hat z_\varnothing).$$
#
# $w = 0$ is the null text, $w = 1$ the text as it is, and $w > 1$ exaggerates. (Some papers write
# $(1+\omega)\hat\epsilon_y - \omega\hat\epsilon_\varnothing$: their $\omega$ is $w - 1$.) `guided` wraps a model so
# that it answers like this.

# %%
pigs = {}
for w in (0, 1, 3, 7.5):
    denoise = guided(prior.denoise, null, w)
    pigs[w] = posterior_mean(x, draw, denoise(x, draw.t, repeat(pig, len(x))))
figures.strips({f"w = {w:g}": prior.decode(mean) for w, mean in pigs.items()}, names)

# %% [markdown]
# At $w = 1$ the text speaks only where noise has hidden the picture. At 3, this model's own scale, the cat turns pink
# at every level and keeps its shape. At 7.5, the usual scale of Stable Diffusion, this model shouts: colours that no
# picture has, at $t = 900$ a white spot where there was an animal. The second formula says why. $\hat z_w$ lies on the
# straight line through two posterior means, and for $w > 1$ it lies *outside* of both. It is no longer the mean of any
# pictures, and nothing keeps it where pictures are. The latents grow:

# %%
table = Rows({"w": w, **{name: float(r) for name, r in zip(names, rms(mean), strict=True)}} for w, mean in pigs.items())
print(f"rms of the latents of the cat: {float(rms(z)):.2f}")
table

# %% [markdown]
# The exact model shows that this is not the small network's fault. Red points are put under noise, and the *perfect*
# model is asked for blue:

# %%
red = plane.sample(plane.red, 300, generator)[..., None, None]
one = with_noise(plane.denoiser.alphas_cumprod, torch.full((300,), 400), red, generator)
blue = repeat(plane.denoiser.text(plane.blue), 300)

figure, panels = plt.subplots(1, 4, figsize=(10, 2.8), sharex=True, sharey=True, layout="constrained")
for w, axes in zip((0, 1, 3, 7.5), panels, strict=True):
    mean = posterior_mean(one.noised(red), one, plane.guided(w)(one.noised(red), one.t, blue))
    for weights, colour in ((plane.red, "C3"), (plane.blue, "C0")):
        axes.plot(*plane.sample(weights, 300, generator).T, ".", ms=3, color=colour, alpha=0.25)
    axes.plot(*mean[..., 0, 0].T, ".", ms=3, color="black")
    axes.set(title=f"w = {w:g}", xlim=(-2.5, 6), ylim=(-3.5, 2), aspect="equal")
plt.show()

# %% [markdown]
# Without a text ($w = 0$) the means lie where red and blue overlap; with $w = 1$ on the side of blue; with $w = 3$ at
# its far edge, and with 7.5 they have left the data altogether, away from red. Guidance buys clearness for truth. An
# edit shows both: too small a scale changes nothing, too large a one gives glaring colours.
#
# ## What to take along
#
# - A diffusion model answers with noise, $\hat\epsilon$. Read it as a slope ($-\hat\epsilon/s_t$ points to where it is
#   more probable) or as a picture ($\hat z = (x_t - s_t\hat\epsilon)/a_t$, the mean of what could be there). It is one
#   answer in two spellings.
# - High noise asks about the large things, low noise about details. An edit has to ask at many levels.
# - A posterior mean is blurred because it has to be; even a perfect model does not find the source again.
# - What a text says is the *difference* between two answers, and it is small. Guidance multiplies it by $w$, with its
#   errors, and beyond $w = 1$ the answer is no mean of anything.
#
# Of this model one cannot say more than that it tells its 24 animals apart and paints them coarsely. Do try `"a bee"`
# in section 7, another scene (`../scenes/fox.ply`), or a camera from behind: does it still know the front from the
# back?
#
# Next: [03 SDS, DDS, PDS, IDS on toy points](03_toy_points.ipynb) makes edits out of these answers.
