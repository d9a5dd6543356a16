# %% [markdown]
# # Splats: a live edit, masks, strength
#
# The other notebooks take an edit apart. This one uses it: a scene of splats, an edit that is watched and steered while
# it runs, a mask that says which splats may change, and what can be done with the result afterwards.
#
# 1. look at the scene, and choose the splats that may change;
# 2. start the edit, watch it in the live viewer, hold it, look, go on;
# 3. see that what was outside the mask has kept its bits;
# 4. weaken the edit, undo it, redo it, put another one on top.

# %%
import hashlib
import tempfile
from pathlib import Path

import torch

import splatedit
from splatedit import figures, masks
from splatedit.mask_run import highlight
from splatedit.regions import identical
from splatedit.sizes import size
from splatedit.stack import Stack

cat = splatedit.load("../scenes/cat.ply")
cat

# %% [markdown]
# ## 1. Which splats may change
#
# A text-driven edit changes whatever the model thinks the text is about. A **mask** draws the line: splats outside it
# have no gradient, no optimiser state and no way to change. Masks are small objects that say what they mean; called
# with a scene they give one truth value for each splat. They combine by `&`, `|` and `~`:

# %%
body = masks.rule("z < 0.5")  # this cat looks along -z; behind 0.5 there is only its tail
feet = masks.box("0, 0.5, 0, 2, 0.3, 2")  # centre and size in the scene's units; y points down here
mask = body & ~feet
chosen = mask(cat)
print(f"{int(chosen.sum()):,} of {cat.n:,} splats")


# %%
def look(scene, azimuths=(25, 115, 205, 295)):
    """Pictures of a scene from some sides, (n, 3, 224, 224)."""
    views = [splatedit.orbit(scene, 1, azimuth=a, elevation=15, size=224) for a in azimuths]
    with torch.no_grad():
        return torch.cat([splatedit.render.render(scene, view).rgb for view in views])


figures.strips({"the scene": look(cat), "may change": look(highlight(cat, chosen))})

# %% [markdown]
# Pink may change. The tip of the tail may, too: it curls forward over the line at 0.5. A rule is plain, not clever.
#
# In the viewer the same is done by hand: the Select tab has a box to drag, a rectangle drawn with shift held, a sphere,
# rules, and the text itself (*what is this edit about?*). On the command line it is `--mask-rule "z < 0.5"`,
# `--mask-box` and so on, see [docs/masks.md](../docs/masks.md).
#
# ## 2. The edit, live
#
# `splatedit.start` returns at once: the edit runs in a thread of its own, beside this notebook. Given the *path* of a
# scene it does what `splatedit run` does on the command line, folder of results and history included; given `Gaussians`
# it stays in memory. The mask goes in as a file.

# %%
folder = Path(tempfile.mkdtemp())
masks_file = folder / "all-but-tail-and-feet.json"
splatedit.mask_files.save(mask, masks_file)

job = splatedit.start(
    "../scenes/cat.ply",
    "a pig",
    steps=size(150, quick=8),
    mask=str(masks_file),
    output_dir=str(folder),
)

# %% [markdown]
# `job.show()` puts the live viewer into the cell: turn the scene with the mouse while it changes. In a notebook that is
# only being read, on GitHub say, the picture above it is what remains.

# %%
job.show(height=420)

# %% [markdown]
# An edit can be held between two steps and looked at. Nothing is lost by it, and nothing is computed while it is held.

# %%
job.pause()
job.step(size(30, quick=3))  # thirty more steps, then hold again
job.settle()  # wait until it does
part = job.snapshot()  # the splats as they are now
print(f"held after {job.last.index + 1} of {job.steps} steps, loss {job.last.loss:.2f}")

# %%
job.resume()
pig = job.result()  # waits for the end, and raises here what went wrong there
figures.strips({"before": look(cat), "held": look(part), "after": look(pig)})

# %%
splatedit.compare(cat, pig)

# %% [markdown]
# The run says itself what it did, and whether it worked:

# %%
change = job.outcome.record["change"]
print("verdict:", change["verdict"])
print(f"splats that changed: {change['changed_share']:.0%}")
print(f"PSNR to the source: {change['psnr_to_source']:.1f} dB")
print(f"the model prefers 'a pig' in {change['prefers_target']:.0%} of the views")

# %% [markdown]
# ## 3. Outside the mask: the same bits
#
# Not *nearly* the same. Each of the numbers of each splat outside the mask is compared:

# %%
same = identical(cat, pig)
print(f"outside the mask: {int((same & ~chosen).sum()):,} of {int((~chosen).sum()):,} splats are identical")
print(f"inside:           {int((same & chosen).sum()):,} of {int(chosen.sum()):,}")
assert same[~chosen].all()

# %% [markdown]
# ## 4. Afterwards: strength, undo, redo
#
# Beside `edited.ply` lies its history. No splat was added or removed, so the edit is one difference for each number of
# each splat, and a part of it can be had by adding a part of the difference: positions, log sizes, logit opacities and
# colours as they stand in the file, rotations on the shorter arc.

# %%
history = Stack.open(job.outcome.edited)
strengths = (0.0, 0.25, 0.5, 0.75, 1.0)
figures.strips(
    {"": torch.cat([look(history.weakened(s).gaussians, (25,)) for s in strengths])},
    [f"strength {s:g}" for s in strengths],
)

# %% [markdown]
# Those were pictures only; `strength`, `undo` and `redo` write the file, and each of them is exact. A change of
# strength is an entry of the history like any other, so three are undone below. Undone, the splats are bit for bit
# those of the cat; redone, the file is byte for byte that of the edit.


# %%
def fingerprint(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


edited = job.outcome.edited
whole = fingerprint(edited)
history.strength(0.5)
half = fingerprint(edited)
history.strength(1.0)
print(f"whole {whole}, half {half}, whole again {fingerprint(edited)}")
taken = history.undo(len(history.done))
print(f"{len(taken)} entries undone; the cat again:", bool(identical(cat, splatedit.load(edited)).all()))
history.redo(len(taken))
print("redone; the same file:", fingerprint(edited) == whole)

# %% [markdown]
# A second edit goes on top of the first: start it from `edited.ply`. Its history has both then, and each of them can be
# weakened by itself. From a terminal the same is
#
#     splatedit run edited.ply "a dog" --mask-rule "z > 0.5"
#     splatedit history edited.ply
#     splatedit strength edited.ply 0.5
#
# A turntable to end with:

# %%
splatedit.animate(pig, size=160)
