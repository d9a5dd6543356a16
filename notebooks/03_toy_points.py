# %% [markdown]
# # SDS, DDS, PDS, IDS on toy points
#
# **Score distillation** turns what a diffusion model says of a picture (notebook 02) into a direction in which to
# change the picture. There are many recipes. On pictures their differences drown in what the network does not know. So
# here "pictures" are points of the plane, the text is a colour, and the model is **exact**: a mixture of Gaussians,
# whose score is a formula. The edit: red points shall become blue ones, and each shall go no further than it has to.
# Whatever goes wrong now is the recipe's fault.
#
# All recipes are functions with the same arguments, `GUIDANCE[name](denoise, z, draw, request)`, and the ones used here
# are the very ones that edit scenes.

# %%
import matplotlib.pyplot as plt
import torch

from splatedit import figures
from splatedit.diagnostics import Rows
from splatedit.diffusion import MixtureDenoiser, repeat, with_noise
from splatedit.displays import animate
from splatedit.fpr import fpr
from splatedit.guidance import GUIDANCE, Request
from splatedit.points import Plane, compare, moons, travel
from splatedit.posterior import pds_weights
from splatedit.sizes import size

generator = torch.Generator().manual_seed(0)
count, steps = size(200, quick=60), size(600, quick=150)  # points, and steps of an edit

# %% [markdown]
# ## 1. The simplest edit there is
#
# First one Gaussian for each colour: red around $m_r$, blue around $m_b$, and the null text, "any point", around $m_0$
# between them. All have the same width.

# %%
sigma = 0.5
red, blue, middle = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 0.25]], dtype=torch.float64)
model = MixtureDenoiser(torch.stack([red, blue, middle])[..., None, None], floor=sigma**2)
plane = Plane(model, red=(1, 0, 0), blue=(0, 1, 0), null=(0, 0, 1))

z = plane.sample(plane.red, count, generator)[..., None, None]  # "latents" of one place and two channels
target, source = (repeat(model.text(weights), count) for weights in (plane.blue, plane.red))
request = Request(target, source, z_source=z)


# %% [markdown]
# For one Gaussian of width $\sigma$ around $m$ the exact answer of the model is a straight line, and guidance with
# scale $w$ only moves its centre:
#
# $$\hat\epsilon(x_t) = k_t\,(x_t - a_t m_w), \qquad k_t = \frac{s_t}{a_t^2\sigma^2 + s_t^2},
# \qquad m_w = m_0 + w\,(m - m_0).$$
#
# Everything that follows can therefore be worked out with a pencil, and is: *foretold* in the tables is the formula,
# *measured* is the code.


# %%
def line(t):
    """k_t and a_t of the formula."""
    a, s = model.alphas_cumprod[t].sqrt(), (1 - model.alphas_cumprod[t]).sqrt()
    return float(s / (a**2 * sigma**2 + s**2)), float(a)


draw = with_noise(model.alphas_cumprod, torch.full((count,), 300), z, generator)
k, a = line(300)
ehat = model(draw.noised(z), draw.t, target)
foretold = k * (draw.noised(z)[..., 0, 0] - a * blue)
print(f"largest difference: {(ehat[..., 0, 0] - foretold).abs().max():.0e}")

# %% [markdown]
# ## 2. SDS: climb to the target
#
# Score distillation sampling (DreamFusion) puts the picture under noise, asks the model under the **target** text, and
# takes the noise that was put in away from the noise that was found:
#
# $$g_{SDS} = w(t)\,[\hat\epsilon_w(x_t, t, y_{tgt}) - \epsilon].$$
#
# Delta denoising (DDS) takes away something else, the answer for the **source under the same noise**:
#
# $$g_{DDS} = \hat\epsilon_w(a_t z + s_t\epsilon,\, t,\, y_{tgt})
# - \hat\epsilon_w(a_t z_{src} + s_t\epsilon,\, t,\, y_{src}).$$
#
# The edit goes *against* $g$. Here is the first step of both, from every red point, with fresh noise for each:

# %%
denoise = plane.guided(1.0)  # scale 1: no guidance yet
gradients = {name: GUIDANCE[name](denoise, z, draw, request) for name in ("sds", "dds")}

figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for axes, (name, g) in zip(panels, gradients.items(), strict=True):
    for centre, colour in ((red, "C3"), (blue, "C0")):
        axes.add_patch(plt.Circle(centre.tolist(), 2 * sigma, color=colour, alpha=0.15))
    axes.quiver(*z[::4, :, 0, 0].T, *-g[::4, :, 0, 0].T, color="black", width=0.004, scale=8)
    axes.set(title=name, xlim=(-2.7, 2.2), ylim=(-1.5, 1.6), aspect="equal")
plt.show()

# %% [markdown]
# (Discs: red and blue out to two standard deviations.) SDS aims each point at the middle of blue, with some chance in
# every arrow, although the model is perfect. DDS pulls every point the same way, and there is no chance in it at all.
# The formulas say just that:
#
# $$\mathbb E\, g_{SDS} = w(t)\, k_t a_t\,(z - m_w),
# \qquad g_{DDS} = k_t a_t\,\big[(z - z_{src}) - w\,(m_{tgt} - m_{src})\big].$$

# %%
weight = draw.s[0].item() ** 2  # w(t) of SDS
expected = {"sds": weight * k * a * (z[..., 0, 0] - blue), "dds": k * a * (red - blue).expand(count, 2)}  # at z = z_src
table = Rows()
for name, g in gradients.items():
    chance = g[..., 0, 0] - expected[name]
    row = {"guidance": name, "expected length": float(expected[name].norm(dim=1).mean())}
    table.append(
        {**row, "the rest: mean": float(chance.mean(0).norm()), "rms": float(chance.square().sum(1).mean().sqrt())}
    )
table

# %% [markdown]
# (SDS is shorter by its weight $w(t) = s_t^2$.) The rest is noise, of mean 0 up to the number of points. In SDS its rms
# is a fifth of the pull here, and in a picture of thousands of numbers, where a text says little about each, it is most
# of it. **This is what DDS's subtraction removes**, and with it the pull towards the middle. It is easiest to see when
# *nothing* is asked for, source and target being the same: a good guidance then leaves the picture alone.

# %%
same = request._replace(target=request.source)
table = Rows()
for name in ("sds", "dds"):
    g = GUIDANCE[name](denoise, z, draw, same)
    table.append({"guidance": name, "rms of g when nothing is asked for": float(g.square().mean().sqrt())})
table

# %% [markdown]
# ### Where they end
#
# `travel` follows a guidance for a whole edit, with noise levels drawn at random as in a real one. Setting the formulas
# to zero says where it must end: SDS at $m_w$, wherever a point came from; DDS at $z_{src} + w\,(m_{tgt} - m_{src})$,
# every point shifted alike.

# %%
journeys = {
    (name, w): travel(plane, name, scale=w, count=count, steps=steps, t_range=(0.1, 0.5))
    for name in ("sds", "dds")
    for w in (1.0, 3.0)
}
table = Rows()
for (name, w), journey in journeys.items():
    start = journey.path[0]
    foretold = (middle + w * (blue - middle)).expand_as(start) if name == "sds" else start + w * (blue - red)
    error = (journey.points - foretold).norm(dim=1).mean()
    table.append(
        {"guidance": name, "w": w, "moved": journey.moved, "spread": journey.spread, "from foretold": float(error)}
    )
table


# %%
def show_journey(axes, journey, title):
    """Paths from red to where they end."""
    axes.plot(*journey.path[:, ::4].permute(2, 0, 1), color="0.7", lw=0.5)
    axes.plot(*journey.path[0].T, ".", ms=3, color="C3")
    axes.plot(*journey.points.T, ".", ms=4, color="black")
    axes.set_title(title, fontsize=10)
    axes.set_aspect("equal")


figure, panels = plt.subplots(1, 4, figsize=(11, 2.6), sharex=True, sharey=True, layout="constrained")
for axes, ((name, w), journey) in zip(panels, journeys.items(), strict=True):
    axes.add_patch(plt.Circle(blue.tolist(), 2 * sigma, color="C0", alpha=0.25))
    show_journey(axes, journey, f"{name}, w = {w:g}")
plt.show()

# %% [markdown]
# (Blue disc: blue out to two standard deviations; red: where the points began; black: where they end.)
#
# - **SDS collapses.** Every point ends in the same place; the spread, variance of the end points over that of as many
#   blue ones, is near 0. SDS does not sample pictures of blue, it looks for the *top of the hill*. And it has forgotten
#   where a point came from: on pictures this is why SDS loses what the source looked like.
# - **Guidance overshoots.** With $w = 3$ the hill itself stands at $m_0 + 3(m_b - m_0)$, where no blue point is. On
#   pictures: glaring colours.
# - **DDS keeps the shape** of the cloud (its spread is that of the red points, a little larger by chance), and
#   overshoots as well, by a law of the same kind: three times the way instead of one.
#
# ## 3. PDS: held at the source
#
# Posterior distillation (PDS) adds a spring that pulls back to the source,
#
# $$g_{PDS} = \psi_t\,(z - z_{src}) + \chi_t\,(\hat\epsilon_{tgt} - \hat\epsilon_{src}),$$
#
# with two tables of weights that follow from the schedule, `pds_weights`. (The paper writes it with a second noise,
# which cancels.)

# %%
psi, chi = pds_weights(model.alphas_cumprod)
figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
axes.semilogy(psi, label=r"$\psi_t$, back to the source")
axes.semilogy(chi, label=r"$\chi_t$, towards the target")
axes.set_xlabel("step $t$")
axes.legend()
plt.show()

# %% [markdown]
# The spring is strong where there is little noise, which is where details are decided, and weak where there is much. At
# one noise level the balance of the two terms is at a share of the way of DDS,
#
# $$z - z_{src} = w\,(m_{tgt} - m_{src})\,\frac{\chi_t k_t a_t}{\psi_t + \chi_t k_t a_t}.$$
#
# A detail of the official code hides in $\psi$: it combines weights of one step with a stride of two. With `stride=1`
# the posterior is consistent, $\psi$ is exactly 0, and PDS is DDS with other weights.

# %%
table, length = Rows(), float((blue - red).norm())
for t in (100, 300, 500, 700):
    k, a = line(t)
    pull = float(chi[t]) * k * a
    way = {
        stride: travel(plane, "pds", count=10, steps=600, rate=1.0, t_range=(t / 1000, t / 1000), stride=stride).moved
        for stride in (2, 1)
    }
    row = {
        "t": t,
        "share foretold": pull / (float(psi[t]) + pull),
        "measured": way[2] / length,
        "stride 1": way[1] / length,
    }
    table.append(row)
table

# %% [markdown]
# ## 4. IDS: noise in which the source is found again
#
# DDS asks about the source under noise, too. But notebook 02 has shown that even a perfect model does not find the
# source in its own noised copy: the posterior mean $\hat z = (x_t - s_t\hat\epsilon)/a_t$ drifts away from $z_{src}$.
# Then "the difference between target and source" starts from something that is not the source. **Identity-preserving
# distillation** (IDS) first looks for better noise, by *fixed-point regularisation* (FPR): a few steps, each of length
# $\lambda$, downhill on
#
# $$r(x) = \big\|\, z_{src} - \hat z(x) \,\big\|, \qquad x \leftarrow x - \lambda\, \nabla_x r,
# \qquad \epsilon^* = (x - a_t z_{src}) / s_t,$$
#
# and then does DDS with $\epsilon^*$ in both branches. Single Gaussians are too simple to show it. From here on: two
# **moons**.

# %%
sickles = moons()
moon = sickles.sample(sickles.red, count, generator)[..., None, None]
told = repeat(sickles.denoiser.text(sickles.red), count)
exact = sickles.guided(1.0)


def posterior_mean(draw):
    """Tweedie's formula, for the source under its own text."""
    x = draw.noised(moon)
    return (x - draw.s * exact(x, draw.t, told)) / draw.a


draw = with_noise(sickles.denoiser.alphas_cumprod, torch.full((count,), 400), moon, generator)
search = fpr(exact, moon, draw, told, iters=3, lam=100.0)
refined = draw._replace(noise=search.noise)

figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for axes, (name, now) in zip(panels, (("as drawn", draw), ("after 3 steps of FPR", refined)), strict=True):
    ends = torch.stack([moon, posterior_mean(now)])[..., 0, 0]  # (2, n, xy)
    axes.plot(*ends.permute(2, 0, 1), color="0.75", lw=0.7)
    axes.plot(*ends[0].T, ".", ms=4, color="C3")
    axes.plot(*ends[1].T, ".", ms=4, color="black")
    axes.set_title(f"noise {name}", fontsize=10)
    axes.set_aspect("equal")
plt.show()

# %% [markdown]
# Red: the source points. Black: where the perfect model sees them, at $t = 400$, joined by lines. Under noise as it
# comes the moon is seen smaller than it is, and many points on the wrong side of it; after three steps of FPR nearly
# every point is seen on its own part of the moon, if not yet where it is. Over noise levels:

# %%
table = Rows()
for t in (100, 300, 500, 800):
    draw = with_noise(sickles.denoiser.alphas_cumprod, torch.full((count,), t), moon, generator)
    search = fpr(exact, moon, draw, told, iters=3, lam=100.0)
    before, after = (
        (posterior_mean(d) - moon).flatten(1).norm(dim=1).mean() for d in (draw, draw._replace(noise=search.noise))
    )
    rms = {"rms of noise": float(search.rms[0].mean()), "refined": float(search.rms[-1].mean())}
    table.append({"t": t, "drift": float(before), "after FPR": float(after), **rms})
table

# %% [markdown]
# FPR helps most in the middle. At high noise three steps do not get far, and at low noise they pay with noise nearly
# twice as large as a model is trained on (rms of two random numbers: 0.89 on average). $\lambda = 100$ looks enormous;
# it is a length in Stable Diffusion's latents of 4 x 64 x 64 numbers, and shrinks with the root of the dimension, to
# 1.1 in the plane.
#
# ## 5. All four
#
# The same 200 points, the same noise, scale 1. `compare` sends all four on their way with the settings in
# `points.GUIDES` (a step size at which PDS arrives as well, and $\lambda$ for IDS).

# %%
runs = compare(sickles, count=count, steps=steps)

figure, panels = plt.subplots(1, 4, figsize=(11, 2.9), sharex=True, sharey=True, layout="constrained")
aim = sickles.sample(sickles.blue, 400, generator)
for axes, (name, journey) in zip(panels, runs.items(), strict=True):
    axes.plot(*aim.T, ".", ms=3, color="C0", alpha=0.3)
    show_journey(axes, journey, name)
plt.show()


# %%
def frame(index):
    """All four after so many steps."""
    figure, (panels,) = figures.new(1, 4, 1.6, 1.5)
    for axes, (name, journey) in zip(panels, runs.items(), strict=True):
        axes.plot(*aim.T, ".", ms=1, color="C0", alpha=0.4)
        axes.plot(*journey.path[index].T, ".", ms=2, color="black")
        axes.set(xlim=(-2, 2), ylim=(-1.5, 1.5), xticks=[], yticks=[])
        axes.set_title(name, fontsize=8)
    return figures.pixels(figure, dpi=100)


moments = [round(steps * (i / 23) ** 2) for i in range(24)]  # much happens early
animate([frame(index) for index in [*moments, *[steps] * 6]], fps=8)

# %%
Rows(
    {
        "guidance": name,
        "moved": journey.moved,
        "spread": journey.spread,
        "distance to blue": journey.distance,
        "arrived": journey.arrived,
    }
    for name, journey in runs.items()
)

# %% [markdown]
# *moved*: mean way of a point; *spread*: variance over that of blue; *distance*: how far the black cloud is from a blue
# one as a whole (Wasserstein-2); *arrived*: the share of points where blue points are.
#
# - **SDS** ends in a single point, and not even on the moon: under noise the moon is a blob, and the blob's top lies in
#   its hollow. "Mode seeking" means modes of the *blurred* density.
# - **DDS** keeps a cloud, but a third of its points stray off the moon. Its arrows are right where red and blue have
#   the same shape (section 2), and only nearly right here.
# - **PDS** moves least, and stops half-way: the spring.
# - **IDS** moves less than DDS, and nine of ten points arrive.
#
# Two things that are often said do **not** hold here. PDS does not arrive with less change; at this scale it does not
# arrive. And IDS, though fewer of its points miss, is no nearer to blue *as a distribution* than DDS: its points crowd
# at the two tips of the moon, next to where they came from.
#
# ### With guidance
#
# Real edits use scales of 3 to 100. On the exact model:

# %%
table = Rows()
for w in (1.0, 3.0, 7.5):
    more = runs if w == 1 else compare(sickles, count=count, steps=steps, scale=w)
    table.append({"w": w, **{f"{name} arrived": journey.arrived for name, journey in more.items()}})
table

# %% [markdown]
# Guidance that is too strong carries DDS and IDS past blue, for the null text here is "red or blue", and away from it
# leads on and on. PDS needs it: scale 3 is what the spring gives way to. (At 3 all of SDS "arrives": in one single
# point, that happens to lie on the moon. One number never tells the whole story.) This is why every guidance has a
# scale of its own, and why `splatedit` asks the model for it (`prior.default_scale`).
#
# ## What to take along
#
# - SDS asks "what would be better here?" and takes noise for the answer to "what is here?". It collapses, and
#   overshoots with guidance.
# - DDS lets the model say what is here, under the same noise. Noise cancels, shapes survive.
# - PDS adds a spring to the source; IDS looks for noise under which the model sees the source as it is.
# - The tables are of **exact** scores and points with two coordinates. They say what the recipes do, not how a picture
#   will look: there the network's errors come on top. Notebook 04 looks at FPR on a picture, step by step; notebook 05
#   sets the recipes side by side on pictures.
#
# To try: `moons(width=0.3)`; other noise levels in `compare(..., t_range=(0.05, 0.3))`; `travel(sickles,
# "dreamcatalyst", rate=1.0)`.
