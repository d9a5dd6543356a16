"""The numbers that decide which Gaussian colours which pixel: those of the installed gsplat, or of 1.5.3 without one.

They are written here once, and reach the kernels as arguments: numba freezes a global into its cache on disk, where
an upgrade of gsplat would not be seen.
"""

from importlib import metadata


def _gsplat_release() -> tuple[int, int]:
    """Major and minor version of the installed gsplat, which is not imported; (1, 5) if there is none."""
    try:
        major, minor = metadata.version("gsplat").split(".")[:2]
        return int(major), int(minor)
    except (metadata.PackageNotFoundError, ValueError):
        return 1, 5


_NEW = _gsplat_release() >= (1, 6)

ALPHA_MAX = 0.99 if _NEW else 0.999  # cuda/include/Common.h; an alpha is cut here, and then passes no gradient on
ALPHA_MIN = 1.0 / 255.0  # cuda/include/Common.h; a fainter contribution is left out
T_STOP = 1e-4  # the Gaussian that would bring the transmittance to this or below ends the pixel, itself left out
EXTEND = 3.33  # standard deviations a Gaussian reaches at most; 1/255 at opacity 1 lies at 3.329
MIN_COMPENSATION = 0.005 if _NEW else 0.0  # cuda/include/Utils.cuh, add_blur; "antialiased" dims by no less than this
TILE = 16  # pixels along a tile; the picture does not depend on it
