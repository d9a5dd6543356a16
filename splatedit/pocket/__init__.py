"""`pocket`: the small text-to-image latent diffusion model that ships with splatedit, and the scripts that made it."""

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
