# %% [markdown]
# # What a score says: noise, Tweedie, CFG
#
# Work in progress.

# %%
import matplotlib.pyplot as plt
import torch

import splatedit
from splatedit.diffusion import scaled_linear

gaussians = splatedit.load("../scenes/cat.ply")
gaussians.n

# %% [markdown]
# How much of the picture is left at each step.

# %%
figure, axes = plt.subplots(figsize=(5, 2.5), layout="constrained")
axes.plot(torch.arange(1000), scaled_linear().sqrt())
plt.show()
