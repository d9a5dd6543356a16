# %% [markdown]
# # Image edits, side by side
#
# Before a splat is edited it pays to edit one *picture*: it is the same guidance, without cameras and rasteriser, and
# an edit takes seconds. This notebook turns a picture of a cat into a pig by several guidances, from the same noise,
# and asks of each: how far did it get, what did it keep, what did it cost, and can it be undone?
#
# 1. An edit is a loop
# 2. Five guidances, one picture
# 3. Far and faithful at once? Numbers
# 4. What the guidance scale does
# 5. The published settings against the fast ones
# 6. There and back again
#
# Everything runs on a laptop CPU with the small bundled model in three to four minutes. Faces are the weak part of
# its edits: it is too small to draw them.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import splatedit
from splatedit import diagnostics
from splatedit.config import PRESETS
from splatedit.displays import animate, compare
from splatedit.figures import strips
from splatedit.images import decode, edit_images, encode
from splatedit.metrics import margins, psnr
from splatedit.priors import load_prior
from splatedit.render import render
from splatedit.sizes import size

# %% [markdown]
# The picture is a render of a bundled scene, as large as the model was trained on. `images.read_picture("cat.png",
# 128)[None]` would bring one of your own. An edit works on the autoencoder's latents, and no edit can be closer to
# the picture than the picture that only went through the autoencoder; so that one is the measure.

# %%
prior = load_prior("pocket")
gaussians = splatedit.load("../scenes/cat.ply")
camera = splatedit.orbit(gaussians, 1, azimuth=30, size=prior.image_size, up="-y")
with torch.no_grad():
    picture, alpha, *_ = render(gaussians, camera)
source = decode(prior, encode(prior, picture))
strips({"": torch.cat([picture, source])}, ["the render", "encoded and decoded"])

# %% [markdown]
# ## 1. An edit is a loop
#
# `edit_images` is a generator: each step asks the model once, and moves the latents $z$ a little against the gradient
# $g$ that the guidance makes of its answer,
#
# $$z \leftarrow z - \eta\, g, \qquad \eta = 0.0488,$$
#
# plain gradient descent with the rate of the authors' code. Anything can stand in the loop.

# %%
steps = size(80, 4)
frames = [source]
for step in edit_images(picture, "a pig", "a cat", model=prior, guidance="dds", steps=steps):
    if step.index % size(4, 1) == 0:
        frames.append(step.pictures())
print(f"{steps} steps, {step.evaluations} rows through the network, rms of the last gradient {step.loss:.3f}")
animate(frames, fps=8)

# %% [markdown]
# ## 2. Five guidances, one picture
#
# With $x = a z + s e$, the noised edit, $x^0 = a z_0 + s e$, the source with the same noise, and $\hat e(x, y)$, the
# noise that the model sees in $x$ when told $y$:
#
# | name | gradient $g$ | from |
# |---|---|---|
# | `sds` | $s^2\,(\hat e(x, \text{pig}) - e)$ | [2209.14988] |
# | `dds` | $\hat e(x, \text{pig}) - \hat e(x^0, \text{cat})$ | [2304.07090] |
# | `cds` | `dds`, and a contrastive loss that keeps the self-attention's features alike | [2311.18608] |
# | `pds` | `dds` in the posteriors of $x_{t-1}$: adds a pull back to $z_0$ | [2311.13831] |
# | `ids` | `dds` at noise $e^*$ from which the model finds the source again | [2502.19930] |
#
# [2209.14988]: https://arxiv.org/abs/2209.14988
# [2304.07090]: https://arxiv.org/abs/2304.07090
# [2311.18608]: https://arxiv.org/abs/2311.18608
# [2311.13831]: https://arxiv.org/abs/2311.13831
# [2502.19930]: https://arxiv.org/abs/2502.19930
#
# All get the same noise levels and the same seed, so that they see the same noise, and each its default guidance
# scale with this model: 3, and 7.5 for `sds` and `pds`. Every few steps we keep the picture and two measures. The
# **margin**: how much better "a pig" explains the picture to the model than "a cat" does, as a share of its error.
# **PSNR outside**: how well what is no cat has been kept, in dB, over the pixels away from the cat's outline.

# %%
outside = (F.max_pool2d(alpha, 17, 1, 8) < 0.01).float()
every = size(16, 2)
marks = range(every, steps + 1, every)


def follow(**options):
    """An edit to a pig: what there is of it every few steps, and how many rows went through the network so far."""
    options = {"steps": steps, "t_range": (0.05, 0.948), "seed": 1, **options}
    start, pictures, rows = prior.evaluations, [source], [(0, 0)]
    for step in edit_images(picture, "a pig", "a cat", model=prior, **options):
        if step.index + 1 in marks:
            pictures.append(step.pictures())
            rows.append((step.evaluations - start, step.backwards))
    return torch.cat(pictures), rows


def measures(edited):
    """How far an edit got, and what it kept."""
    return {
        "margin": float(margins(prior, edited, "a pig", "a cat")),
        "PSNR outside": psnr(edited, source, outside),
        "PSNR whole": psnr(edited, source),
    }


edits = {name: follow(guidance=name) for name in ("sds", "dds", "cds", "pds", "ids")}

# %%
strips({name: pictures for name, (pictures, _) in edits.items()}, ["source", *(f"step {n}" for n in marks)])

# %% [markdown]
# All but one turn the cat pink first. `sds` goes furthest and pays for it: the face is gone, and the edges bleed.
# `dds`, `cds` and `ids` cannot be told apart by eye; they keep eyes, legs and outline. `pds` has hardly begun: its
# pull back to the source is strong, and 80 steps are few for it. The same as a film:

# %%
animate([torch.cat([pictures[k] for pictures, _ in edits.values()], 2) for k in range(len(marks) + 1)], fps=2)

# %% [markdown]
# From left to right `sds`, `dds`, `cds`, `pds`, `ids`. The source and the last picture of `ids` (in JupyterLab with a
# handle to drag):

# %%
compare(source, edits["ids"][0][-1], words=("cat", "ids"))

# %% [markdown]
# ## 3. Far and faithful at once? Numbers
#
# At the last step:

# %%
table = [
    {"guidance": name, **measures(pictures[-1:]), "rows forward": rows[-1][0], "rows back": rows[-1][1]}
    for name, (pictures, rows) in edits.items()
]
diagnostics.Rows(table)

# %% [markdown]
# Such a table misleads: whoever moves less keeps more. The way there says it better. Each line below is one edit,
# from the source at the upper left; of two lines the *upper* one keeps more of the source for the same amount of pig.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, (pictures, _) in edits.items():
    way = [measures(pictures[k : k + 1]) for k in range(1, len(pictures))]
    for panel, key in zip(axes, ("PSNR outside", "PSNR whole"), strict=True):
        panel.plot([m["margin"] for m in way], [m[key] for m in way], "o-", ms=3.5, label=name)
        panel.set(xlabel="margin: how much of a pig", ylabel=f"{key}, dB")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# Left, over the background: `sds` keeps 7 dB less than the others at the same margin. `dds`, `cds` and `ids` lie on
# one curve, on which `pds` is still at the beginning: here they differ in *how fast* they go, not in what they keep.
# Right, over the whole picture, all five are nearly on one curve: turning a grey cat pink changes its pixels, whoever
# does it.
#
# That `ids` is not above `dds` is no accident of this picture: over 20 edits with three seeds each the
# [comparison](../docs/comparison.md) finds the same for this small model. The papers' order was measured with Stable
# Diffusion.
#
# ## 4. What the guidance scale does
#
# $\hat e = \hat e_\varnothing + w\,(\hat e_y - \hat e_\varnothing)$: with $w = 1$ the model is asked as it is, with
# more it exaggerates what the text adds. Full models were published with 7.5; this one was trained on few pictures
# and is best at 3.

# %%
scales = (1.0, 3.0, 7.5, 15.0)
scaled = {w: follow(guidance="dds", guidance_scale=w)[0] for w in scales}
strips(
    {"dds": torch.cat([source, *(pictures[-1:] for pictures in scaled.values())])},
    ["source", *(f"w = {w:g}" for w in scales)],
)

# %%
diagnostics.Rows({"scale w": w, **measures(pictures[-1:])} for w, pictures in scaled.items())

# %% [markdown]
# Asked as it is ($w = 1$) the model gets no further than half-way in as many steps; 3 gives a pig. At 7.5 the colours
# run out of range, and at 15 the body is gone: even the model's own margin falls. More guidance is not more of the
# target.
#
# ## 5. The published settings against the fast ones
#
# `ids` asks for the gradient of the network three times a step: that is its price. `--preset fast` (here
# `PRESETS["fast"]`) searches the noise by two fixed-point iterations under the empty text instead, and keeps what the
# model says of the source from one step to the next. [Notebook 04](04_fpr_step_by_step.ipynb) explains both.

# %%
print("paper:", PRESETS["paper"])
print("fast: ", PRESETS["fast"])
fast, spent = follow(guidance="ids", **PRESETS["fast"])
strips(
    {"": torch.cat([source, edits["ids"][0][-1:], fast[-1:], edits["dds"][0][-1:]])},
    ["source", "ids, paper", "ids, fast", "dds"],
)

# %%
kinds = {"ids, paper": edits["ids"], "ids, fast": (fast, spent), "dds": edits["dds"]}
diagnostics.Rows(
    {"edit": name, **measures(pictures[-1:]), "rows forward": rows[-1][0], "rows back": rows[-1][1]}
    for name, (pictures, rows) in kinds.items()
)

# %% [markdown]
# The fast settings end at the same picture for a fifth of the rows forward and none back, without the memory that
# gradients through the network take. With *this* model `dds` is as good and simpler; where `ids` is wanted, fast is
# the way to try things out, and paper the one to compare with publications.
#
# ## 6. There and back again
#
# An edit that changed only what the text asked for can be undone by asking for the opposite: edit the cat to a pig,
# then the *result* from "a pig" to "a cat". What does not come back was not part of the request.
# `diagnostics.invertibility` does it for several guidances from the same seed.

# %%
subject = diagnostics.Subject(prior, "a cat", "a pig", pictures=picture)
table = diagnostics.invertibility(
    subject, torch.Generator().manual_seed(0), guidances=("sds", "dds", "cds", "pds", "ids"), steps=size(60, 2)
)
table

# %%
diagnostics.averaged(table.rows, ("guidance",), ("moved", "psnr_edit", "distance", "psnr", "ssim"))

# %% [markdown]
# `moved` and `psnr_edit` tell how far the edit had gone, `distance` and `psnr` what is missing after the way back.
# `sds` does not come home: four fifths of its way are lost, face included, since it never asks what the source was.
# `dds`, `cds` and `ids` lose 13 % of theirs, and alike. `pds` comes back best *and had gone least*: a guidance
# that moves nothing loses nothing.
#
# All of it for a picture of yours, on the command line:
#
# ```bash
# splatedit image cat.png "a pig" --source "a cat" --compare sds,dds,cds,pds,ids
# splatedit diagnose cat.png "a pig" --source "a cat"
# ```
#
# Back: [04, FPR step by step](04_fpr_step_by_step.ipynb). The same guidances on splats: `splatedit run scenes/cat.ply
# "a pig"`.
