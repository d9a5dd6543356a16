# %% [markdown]
# # A first edit
#
# A *splat* is a scene made of many small coloured blobs, 3D Gaussians. This notebook takes one of a cat and edits it
# until a diffusion model takes it for a pig. On the way the edit is held, looked at, let go on, compared with the
# source and saved. Nothing here needs a GPU: the scene is small, and so is the bundled model, `pocket`, which knows
# little but toy animals.
#
# 1. The scene
# 2. Start, and watch
# 3. Hold it and look
# 4. To the end
# 5. Before and after
# 6. Save

# %%
from pathlib import Path

import matplotlib.pyplot as plt

import splatedit
from splatedit.sizes import size

# %% [markdown]
# ## 1. The scene
#
# `load` reads any splat file. What comes back is a plain named tuple of tensors: positions, sizes, rotations,
# opacities, colours. As the last line of a cell it shows itself.

# %%
gaussians = splatedit.load("../scenes/cat.ply")
gaussians

# %% [markdown]
# The bare file is all there is: no photographs, no cameras. So cameras are put around the scene; an edit looks from
# this dome unless you say otherwise.

# %%
splatedit.dome(gaussians, 48)

# %% [markdown]
# ## 2. Start, and watch
#
# `start` begins the edit in the background and returns at once, so the notebook stays yours. It is told what the scene
# shall show and what it shows now: where the model's answers to the two differ is where the edit goes. The method is
# IDS ([arXiv 2502.19930](https://arxiv.org/abs/2502.19930)), here by a fast solver; notebook 04 is about it.
#
# `pause` right after holds the edit before its first step, so that nothing is missed.

# %%
settings = {"solver": "picard_null", "fpr_iters": 2, "source_cache": 2}
settings |= {"steps": size(200, quick=9), "views": size(48, quick=6)}
job = splatedit.start(gaussians, "a pig", source="a cat", **settings)
job.pause()

# %% [markdown]
# `show` puts the live viewer into the cell: drag to turn, scroll to come near; its tabs edit, compare, select, measure
# and export. It lives only as long as the kernel. What stays in a saved notebook is the picture above it, which turns
# into *before* and *after* once the edit has ended.

# %%
job.show()

# %% [markdown]
# `progress` is a bar with buttons. Hold the edit with them, step through it or stop it at any time, from here or from
# the viewer.

# %%
job.progress()

# %% [markdown]
# ## 3. Hold it and look
#
# Take the first steps, then hold again. `settle` waits until the edit is held.

# %%
job.step(size(20, quick=3))
job.settle()
early = job.snapshot()
print(job)

# %% [markdown]
# Each step renders the splats from two cameras, asks the model how it would change the two pictures, and moves all
# splats a little so that the pictures follow. This is what the newest step saw. *Loss* is how hard the model still
# pulls; *dB to the source* how near the pictures are to the cat's (above 45 no difference is to be seen); *drift* is
# how far from the cat the model still is when it is asked for the unedited cat (0: it sees it as it is).

# %%
job.last

# %% [markdown]
# So far the colours have begun to turn, while the shape is the cat's.

# %%
splatedit.compare(gaussians, early)

# %% [markdown]
# ## 4. To the end
#
# `resume` lets it go on, `result` waits for the end and returns the edited splats. (While a cell waits, the buttons
# and the viewer still answer.)

# %%
job.resume()
pig = job.result()
pig

# %% [markdown]
# The pull of the model, and the way from the source, over the steps. The pull is noisy, since every step draws other
# cameras and other noise.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4), layout="constrained")
left.plot(job.curve["loss"])
left.set(xlabel="step", ylabel="loss", ylim=(0, None))
right.plot(job.curve["psnr"])
right.set(xlabel="step", ylabel="dB to the source")
plt.show()

# %% [markdown]
# ## 5. Before and after
#
# `compare` lays two things over one another, with a handle to drag: scenes from the same places, or pictures. In a
# notebook that is only read, the pairs stand side by side.

# %%
splatedit.compare(gaussians, pig, views=2)

# %% [markdown]
# `animate` makes a film: of one scene a turntable, of several how one becomes the other.

# %%
splatedit.animate(pig, frames=size(24, quick=6))

# %% [markdown]
# ## 6. Save
#
# The ending says the format: `.ply`, `.compressed.ply`, `.splat`, `.spz` or `.sog`.

# %%
path = Path("../outputs/pig.ply")
path.parent.mkdir(exist_ok=True)
splatedit.save(pig, path)
print(f"{path}: {pig.n:,} Gaussians, {path.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# From a file, the same edit is a *run*: `splatedit.start("../scenes/cat.ply", "a pig")` in Python, or on the command
# line
#
#     splatedit run scenes/cat.ply "a pig" --preset fast --steps 200
#
# Either writes a folder with the edited file, pictures, a film, a report and all settings, can go on where it was cut
# off, and can be undone: `splatedit history`. A viewer opens beside it with `--viewer`.
#
# **Try.** Another target (`"a panda"`, `"a fox"`), another scene (`bear`, `dog`, `fox`, `penguin`), `guidance="dds"`,
# more steps. Words that `pocket` does not know are an error that lists those it knows.
