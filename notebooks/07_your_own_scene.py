# %% [markdown]
# # Your own scene, and Stable Diffusion on a GPU
#
# The bundled model knows 24 toy animals. For a scan of your own, and for words of your own, splatedit takes any Stable
# Diffusion (1.x, 2.x, XL) as a diffusers folder or hub id, and a CUDA GPU to run it on. This notebook takes a scene
# from the file to the edited file, and checks on the way what usually goes wrong:
#
# 1. is the scene what splatedit takes it for: which way is up, what is the object, what do the cameras see?
# 2. can this machine run the model, and how long will it take?
# 3. two views as pictures first, in seconds; then the edit.
#
# Steps 1 and 2 work anywhere. Step 3 needs a GPU and the model's weights; without them its cells say so and do nothing,
# and the pictures further down are missing. **On the machine that built this notebook there was no GPU.**
#
# Put your own file here. Until you do, a bundled scene stands in for it.

# %%
import shlex
from importlib.util import find_spec
from pathlib import Path

import torch

import splatedit
from splatedit import doctor, figures, info
from splatedit.cameras import bounds, explain_up
from splatedit.config import as_command, load_config
from splatedit.model_files import locate

SCENE = "../scenes/bear.ply"  # any splat file: .ply .compressed.ply .splat .spz .sog .ksplat, checkpoints
SOURCE = "a bear"  # what it shows now, in words
TARGET = "a panda"  # what it shall show
MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a hub id, or a folder on disk
DEVICE = "cuda"
STEPS = 500

# %% [markdown]
# ## 1. What is in the file

# %%
scene = splatedit.load(SCENE)
scene

# %%
print(info.format(info.describe(SCENE)))

# %% [markdown]
# **Which way is up?** Splat files do not say. Captures by COLMAP mostly have y pointing down, so that `-y` is up;
# splatedit looks for a comment in the header and for a flat ground, and else assumes that. If the scene lies on its
# side below, give `up="+z"` (or another axis) wherever this notebook says `up=up`. The file itself is never turned.

# %%
up, why = explain_up(scene)
print(f"up is {up}: {why}")


# %%
def look(gaussians, count=4, size=224):
    """Pictures from a circle of cameras around the scene, (count, 3, size, size)."""
    views = splatedit.orbit(gaussians, count, elevation=15, size=size, up=up)
    with torch.no_grad():
        return splatedit.render.render(gaussians, views).rgb


figures.strips({"": look(scene)})

# %% [markdown]
# **What is the scene?** A scan has floaters, and a sky perhaps. The cameras are placed around the ball that holds what
# can be seen, weighed by opacity and size, without the few splats far away. If the object is small in the pictures
# above, edit a part of the scene (a mask, notebook 06), or take the cameras of the capture: `cameras="capture/"` reads
# COLMAP, nerfstudio and INRIA folders.

# %%
extent = bounds(scene)
far = (scene.means - extent.centre).norm(dim=1) > extent.radius
print(f"ball of radius {extent.radius:.3g} around {[round(x, 3) for x in extent.centre.tolist()]}, ", end="")
print(f"{int(far.sum()):,} of {scene.n:,} splats outside of it")

# %%
splatedit.dome(scene, 48, up=up)  # the cameras an edit looks from, if there is no capture

# %% [markdown]
# ## 2. Can this machine do it?
#
# The same as `splatedit doctor` in a terminal. Each line that is not `ok` says what to do about it.

# %%
for check in doctor.checks():
    if check.name in ("torch", "cuda", "gpu", "gsplat", "renderer") or check.state != doctor.OK:
        print(f"{check.state:<9}{check.name:<12}{check.found}")

# %% [markdown]
# Three things have to be there for the rest: a GPU that torch can use, gsplat to draw on it, and the model's weights,
# which are fetched from the hub once (some gigabytes) or lie on disk.

# %%
missing = []
if DEVICE == "cuda" and not torch.cuda.is_available():
    missing.append("a CUDA GPU")
if DEVICE == "cuda" and find_spec("gsplat") is None:
    missing.append("gsplat")
if locate(MODEL, offline=True) is None:
    missing.append(f"the weights of {MODEL}")
ready = not missing
print("All there." if ready else f"Missing: {' and '.join(missing)}. The cells of step 3 are skipped.")

# %% [markdown]
# To fetch the weights where there is a network, once:
#
# ```python
# from splatedit.priors import load_prior
#
# load_prior(MODEL, "cuda")
# ```
#
# The settings of the run, and the command that does the same in a terminal. `vram` chooses what fits a GPU of so many
# GB: 8, 12, 16 or 24.

# %%
settings = {"model": MODEL, "device": DEVICE, "up": up, "steps": STEPS, "vram": 12}
trial = {"up": up, "steps": 20}  # the bundled model instead, on the CPU
scene_and_words = {"scene": SCENE, "prompt": TARGET, "source_prompt": SOURCE}
print(shlex.join(as_command(load_config(options={**scene_and_words, **settings}))))

# %% [markdown]
# What would it take? `--dry-run` on the command line; here the same plan, from a few timed steps in memory. Without a
# GPU the trial run with the bundled model is planned instead, so that there is something to see.

# %%
from rich.console import Console

from splatedit import preflight

config = load_config(options={**scene_and_words, **(settings if ready else trial)})
planned = preflight.plan(config, Console(quiet=True, force_jupyter=False))
for name, text in preflight.lines(planned):
    if name in ("cameras", "prompts", "model", "guidance", "evaluations"):
        print(f"{name:<12}{text}")
print(f"{'time':<12}{preflight.duration(planned['seconds']['all'])}")

# %% [markdown]
# ## 3. Two views first, then the scene
#
# An edit of a scene takes minutes; an edit of two of its pictures, with the same guidance and prompts, takes seconds
# and shows whether model, words and scale are any good together. If this does not look like the target, more steps in
# 3D will not either: try another wording, a source prompt that says more, or a higher `guidance_scale`.

# %%
if ready:
    from splatedit.images import edit_images
    from splatedit.priors import load_prior

    prior = load_prior(MODEL, DEVICE)
    pictures = look(scene, 2, prior.image_size).to(prior.device)
    *_, step = edit_images(pictures, TARGET, SOURCE, model=prior, steps=STEPS // 5)
    display(figures.strips({"before": pictures.cpu(), "after": step.pictures().cpu()}))  # noqa: F821  (IPython's)

# %% [markdown]
# The edit itself: in a thread of its own, watched and steered in the live viewer.

# %%
if ready:
    job = splatedit.start(SCENE, TARGET, SOURCE, **settings)
    job.show()

# %%
if ready:
    edited = job.result()
    print("verdict:", job.outcome.record["change"]["verdict"], "in", Path(job.outcome.folder).name)
    figure = figures.strips({"before": look(scene), "after": look(edited.to("cpu"))})
    display(figure)  # noqa: F821

# %%
if ready:
    display(splatedit.compare(scene, edited.to("cpu")))  # noqa: F821

# %% [markdown]
# ## If it went wrong
#
# | what you see | what to try |
# |---|---|
# | nothing changes | a higher `guidance_scale`; a source prompt that names what is there; more `steps` |
# | colours burn, splats scatter | a lower `guidance_scale`, lower rates (`lr_sh0`, `lr_means`) |
# | the background changes too | a mask (notebook 06), `outside=1` |
# | the object is not recognised from above or behind | `cameras="orbit"`, or the cameras of the capture |
# | out of memory | a smaller `vram`; it also steps down once by itself and goes on |
# | stopped half-way | `splatedit run --resume` |
#
# The run's folder has `report.html` with pictures and numbers to look at or to send.
