"""The live viewer, by viser: `splatedit view`, `splatedit run --viewer`, `gaussians.show()`."""
