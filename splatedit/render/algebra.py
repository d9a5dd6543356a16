"""What all compiled stages share: their conventions, how they are compiled, small algebra on vectors.

Every kernel works on range(begin, end) of blocks of LANES Gaussians, of Gaussians, or of tiles, touches nothing that
another range writes, holds no lock and no GIL. Arrays are flat and C-contiguous: point i is means[3 i : 3 i + 3].

One Gaussian in one camera, number f = camera * n + i, is drawn from a packed RECORD of 16 floats, one cache line:
    0 1 mean x, y (pixels)
    2 3 4 A, B, C and 5 top: log2 alpha = A dx^2 + B dx dy + C dy^2 + top, from conic a, b, c and opacity:
        A = -a / (2 ln 2), B = -b / ln 2, C = -c / (2 ln 2), top = log2 opacity
    6 .. 9 four channels
    10 11 -B / (2 A), -B / (2 C): where the ellipse is nearest along a line of constant dy, or dx, per unit of it
    12 .. 15 unused
A backward pass writes one record per (tile, Gaussian) pair instead of adding atomically, and the records of a Gaussian
are then added in a fixed order, so results do not depend on threads:
    0 .. 5 sums of v_sigma * (1, dx, dy, dx dx, dx dy, dy dy)   6 .. 9 channels   10 11 |v_mean| of absgrad

Names: v_x is the gradient of the loss with respect to x. Sources are places in gsplat 1.5.3, under gsplat/cuda.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import numpy as np

from splatedit.render.kernel_cache import jit
from splatedit.render.simd import FAST, load3, load4, store3, store4, vsqrt, where

F = np.float32
RECORD = 16  # floats

# error_model="numpy" makes 1 / 0 infinite instead of a test for it.
kernel = jit(nogil=True, error_model="numpy", fastmath=set(FAST))
inline = jit(nogil=True, error_model="numpy", fastmath=set(FAST), forceinline=True)


# tuples of vectors, matrices by rows


@inline
def put3(array, i, x, add):
    """Rows i .. of (n, 3) become x, or grow by it."""
    if add:
        x = mix(F(1), x, F(1), load3(array, 3 * i))
    store3(array, 3 * i, x)


@inline
def put4(array, i, x, add):
    """Rows i .. of (n, 4) become x, or grow by it."""
    if add:
        y = load4(array, 4 * i)
        x = (x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3])
    store4(array, 4 * i, x)


@inline
def keep3(ok, a):
    return where(ok, a[0], F(0)), where(ok, a[1], F(0)), where(ok, a[2], F(0))


@inline
def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@inline
def cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@inline
def mix(r, a, s, b):
    """r a + s b."""
    return r * a[0] + s * b[0], r * a[1] + s * b[1], r * a[2] + s * b[2]


@inline
def row_times(a, m):
    """Row a times (3, 3) matrix m."""
    return (a[0] * m[0] + a[1] * m[3] + a[2] * m[6], a[0] * m[1] + a[1] * m[4] + a[2] * m[7],
            a[0] * m[2] + a[1] * m[5] + a[2] * m[8])  # fmt: skip


@inline
def columns_times(m, s):
    """m diag(s)."""
    return (m[0] * s[0], m[1] * s[1], m[2] * s[2], m[3] * s[0], m[4] * s[1], m[5] * s[2],
            m[6] * s[0], m[7] * s[1], m[8] * s[2])  # fmt: skip


@inline
def unit4(q):
    """The unit quaternion and the factor that made it one."""
    w, x, y, z = q
    scale = F(1) / vsqrt(w * w + x * x + y * y + z * z)
    return (w * scale, x * scale, y * scale, z * scale), scale


@inline
def rotation(q):
    """Rotation matrix of a unit quaternion (w, x, y, z)."""
    w, x, y, z = q
    return (
        F(1) - (y * y + z * z) * F(2), (x * y - w * z) * F(2), (x * z + w * y) * F(2),
        (x * y + w * z) * F(2), F(1) - (x * x + z * z) * F(2), (y * z - w * x) * F(2),
        (x * z - w * y) * F(2), (y * z + w * x) * F(2), F(1) - (x * x + y * y) * F(2),
    )  # fmt: skip


@inline
def aligned(size):
    """Uninitialised floats from the start of a cache line on: a vector across two lines costs half as much again."""
    memory = np.empty(size + 16, np.float32)
    skip = ((64 - (memory.ctypes.data & 63)) & 63) >> 2
    return memory[skip : skip + size]
