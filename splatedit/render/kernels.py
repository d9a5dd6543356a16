"""The compiled stages of the CPU rasteriser, each with its hand-written backward.

Every kernel works on range(begin, end) of blocks of 16 Gaussians, of Gaussians, or of tiles, touches nothing that
another range writes, holds no lock and no GIL. Arrays are flat and C-contiguous: point i is means[3 i : 3 i + 3].

One Gaussian in one camera, number f = camera * n + i, is drawn from a packed RECORD of 16 floats, one cache line:
    0 1 mean x, y (pixels)   2 3 4 conic xx, xy, yy   5 opacity   6 .. 9 four channels   10 ln(255 opacity)   11 unused
    12 13 14 15 first and last column, first and last row of pixels where alpha can reach 1/255
A backward pass writes one record per (tile, Gaussian) pair instead of adding atomically, and the records of a Gaussian
are then added in a fixed order, so results do not depend on threads:
    0 .. 5 sums of v_sigma * (1, dx, dy, dx dx, dx dy, dy dy)   6 .. 9 channels   10 11 |v_mean| of absgrad

Names: v_x is the gradient of the loss with respect to x. Sources are places in gsplat 1.5.3, under gsplat/cuda.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import numpy as np

from splatedit.render.constants import ALPHA_MIN as _ALPHA_MIN
from splatedit.render.constants import EXTEND as _EXTEND
from splatedit.render.constants import T_STOP as _T_STOP
from splatedit.render.kernel_cache import jit
from splatedit.render.simd import (
    FAST,
    LANES,
    any_lane,
    fma,
    lane_column,
    lane_row,
    prefetch,
    store_sums,
    transpose,
    vabs,
    vceil,
    vexp,
    vfloor,
    vgather,
    vload,
    vlog,
    vmax,
    vmin,
    vscatter,
    vsplat,
    vsqrt,
    vstore,
    where,
)

F = np.float32
ALPHA_MIN, EXTEND, T_STOP = F(_ALPHA_MIN), F(_EXTEND), F(_T_STOP)  # equal in all versions of gsplat: may be frozen

TILE = 16  # pixels; 16, 32 and 64 are equally fast, 16 shares small images out best
SIDE = TILE // 4  # blocks of 4x4 pixels along a tile
BLOCKS = SIDE * SIDE
PIXELS = TILE * TILE
RECORD = 16
AHEAD = 6  # records to prefetch ahead
RADIUS_MAX = F(2**30)  # pixels; a larger float has no int32

# error_model="numpy" makes 1 / 0 infinite instead of a test for it.
kernel = jit(nogil=True, error_model="numpy", fastmath=set(FAST))
inline = jit(nogil=True, error_model="numpy", fastmath=set(FAST), forceinline=True)


# ---------------------------------------------------------------- small algebra: tuples of vectors, matrices by rows


@inline
def _read3(array, i):
    return vgather(array, 3 * i, 3), vgather(array, 3 * i + 1, 3), vgather(array, 3 * i + 2, 3)


@inline
def _read4(array, i):
    return (vgather(array, 4 * i, 4), vgather(array, 4 * i + 1, 4), vgather(array, 4 * i + 2, 4),
            vgather(array, 4 * i + 3, 4))  # fmt: skip


@inline
def _add3(array, i, x):
    vscatter(array, 3 * i, 3, vgather(array, 3 * i, 3) + x[0])
    vscatter(array, 3 * i + 1, 3, vgather(array, 3 * i + 1, 3) + x[1])
    vscatter(array, 3 * i + 2, 3, vgather(array, 3 * i + 2, 3) + x[2])


@inline
def _add4(array, i, x):
    vscatter(array, 4 * i, 4, vgather(array, 4 * i, 4) + x[0])
    vscatter(array, 4 * i + 1, 4, vgather(array, 4 * i + 1, 4) + x[1])
    vscatter(array, 4 * i + 2, 4, vgather(array, 4 * i + 2, 4) + x[2])
    vscatter(array, 4 * i + 3, 4, vgather(array, 4 * i + 3, 4) + x[3])


@inline
def _keep3(ok, a):
    return where(ok, a[0], F(0)), where(ok, a[1], F(0)), where(ok, a[2], F(0))


@inline
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@inline
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@inline
def _sum(r, a, s, b):
    """r a + s b."""
    return r * a[0] + s * b[0], r * a[1] + s * b[1], r * a[2] + s * b[2]


@inline
def _row_times(a, m):
    """Row a times (3, 3) matrix m."""
    return (a[0] * m[0] + a[1] * m[3] + a[2] * m[6], a[0] * m[1] + a[1] * m[4] + a[2] * m[7],
            a[0] * m[2] + a[1] * m[5] + a[2] * m[8])  # fmt: skip


@inline
def _columns_times(m, s):
    """m diag(s)."""
    return (m[0] * s[0], m[1] * s[1], m[2] * s[2], m[3] * s[0], m[4] * s[1], m[5] * s[2],
            m[6] * s[0], m[7] * s[1], m[8] * s[2])  # fmt: skip


@inline
def _unit4(q):
    """The unit quaternion and the factor that made it one."""
    w, x, y, z = q
    scale = F(1) / vsqrt(w * w + x * x + y * y + z * z)
    return (w * scale, x * scale, y * scale, z * scale), scale


@inline
def _rotation(q):
    """Rotation matrix of a unit quaternion (w, x, y, z)."""
    w, x, y, z = q
    return (
        F(1) - (y * y + z * z) * F(2), (x * y - w * z) * F(2), (x * z + w * y) * F(2),
        (x * y + w * z) * F(2), F(1) - (x * x + z * z) * F(2), (y * z - w * x) * F(2),
        (x * z - w * y) * F(2), (y * z + w * x) * F(2), F(1) - (x * x + y * y) * F(2),
    )  # fmt: skip


@inline
def _aligned(size):
    """Uninitialised floats from the start of a cache line on: a vector across two lines costs half as much again."""
    memory = np.empty(size + LANES, np.float32)
    skip = ((64 - (memory.ctypes.data & 63)) & 63) >> 2
    return memory[skip : skip + size]


# ---------------------------------------------------------------- projection


@inline
def _to_camera(view, p):
    """view[:3, :3] p + view[:3, 3]."""
    x, y, z = p
    return (
        x * view[0, 0] + y * view[0, 1] + z * view[0, 2] + view[0, 3],
        x * view[1, 0] + y * view[1, 1] + z * view[1, 2] + view[1, 3],
        x * view[2, 0] + y * view[2, 1] + z * view[2, 2] + view[2, 3],
    )


@inline
def _frustum(K, width, height):
    """Bounds of x / z and y / z: 15 % of the image beyond its edges, where the Jacobian stops changing."""
    margin_x, margin_y = F(0.15) * width / K[0, 0], F(0.15) * height / K[1, 1]
    return (-K[0, 2] / K[0, 0] - margin_x, (width - K[0, 2]) / K[0, 0] + margin_x,
            -K[1, 2] / K[1, 1] - margin_y, (height - K[1, 2]) / K[1, 1] + margin_y)  # fmt: skip


@inline
def _jacobian(view, K, frustum, u, v, inverse_z):
    """Derivatives of the pixel: J = [jx 0 jxz; 0 jy jyz] by the point in the camera, T = J R by that in the world."""
    jx, jy = inverse_z * K[0, 0], inverse_z * K[1, 1]
    jxz, jyz = -jx * vmin(vmax(u, frustum[0]), frustum[1]), -jy * vmin(vmax(v, frustum[2]), frustum[3])
    t0 = (jx * view[0, 0] + jxz * view[2, 0], jx * view[0, 1] + jxz * view[2, 1], jx * view[0, 2] + jxz * view[2, 2])
    t1 = (jy * view[1, 0] + jyz * view[2, 0], jy * view[1, 1] + jyz * view[2, 1], jy * view[1, 2] + jyz * view[2, 2])
    return (jx, jxz, jy, jyz), t0, t1


@inline
def _ellipse(b0, b1, eps2d):
    """xx, xy, yy and determinant of B B^T + eps2d 1, determinant of B B^T, cross product n of the rows of B.

    det B B^T = n . n, and det(A + e 1) = det A + e trace A + e^2: free of the cancellation that in float32 makes
    xx yy - xy xy pure noise for a needle.
    """
    xx, xy, yy, n = _dot(b0, b0), _dot(b0, b1), _dot(b1, b1), _cross(b0, b1)
    sharp = _dot(n, n)
    return xx + eps2d, xy, yy + eps2d, sharp + (xx + yy + eps2d) * eps2d, sharp, n


@kernel
def project(begin, end, chunk, means, quats, scales, opacities, radii, means2d, depths, conics, compensations, view, K,
            width, height, eps2d, near, far, clip, antialiased, least):  # fmt: skip
    """EWA projection into one camera: csrc/ProjectionEWA3DGSFused.cu, include/Utils.cuh (persp_proj, add_blur).

    With B = T rot(q) diag(s) the covariance on screen is B B^T + eps2d 1, the conic its inverse, the compensation
    sqrt(det B B^T / det(B B^T + eps2d 1)), no less than `least`. A Gaussian that cannot be seen gets radii 0.
    """
    frustum = _frustum(K, width, height)
    for i in range(begin * LANES, end * LANES, LANES):
        x, y, z = _to_camera(view, _read3(means, i))
        ok = (z >= near) & (z <= far)
        inverse_z = F(1) / where(ok, z, F(1))
        u, v = x * inverse_z, y * inverse_z
        column, row = u * K[0, 0] + K[0, 2], v * K[1, 1] + K[1, 2]
        _, t0, t1 = _jacobian(view, K, frustum, u, v, inverse_z)
        q, _ = _unit4(_read4(quats, i))
        m = _columns_times(_rotation(q), _read3(scales, i))
        xx, xy, yy, det, sharp, _ = _ellipse(_row_times(t0, m), _row_times(t1, m), eps2d)
        ok = ok & (det > F(0)) & (det < F(1e38))
        inverse_det = F(1) / where(ok, det, F(1))
        compensation = vsqrt(vmax(sharp * inverse_det, least * least))
        opacity = vload(opacities, i) * F(255)
        if antialiased:
            opacity = opacity * compensation
        seen = ok & (opacity >= F(1))
        extend = vmin(vsqrt(vlog(where(seen, opacity, F(1))) * F(2)), EXTEND)
        rx, ry = vmin(vceil(extend * vsqrt(xx)), RADIUS_MAX), vmin(vceil(extend * vsqrt(yy)), RADIUS_MAX)
        seen = seen & ((rx > clip) | (ry > clip))
        seen = seen & (column + rx > F(0)) & (column - rx < width) & (row + ry > F(0)) & (row - ry < height)
        vscatter(radii, 2 * i, 2, where(seen, rx, F(0)))
        vscatter(radii, 2 * i + 1, 2, where(seen, ry, F(0)))
        vscatter(means2d, 2 * i, 2, where(ok, column, F(0)))
        vscatter(means2d, 2 * i + 1, 2, where(ok, row, F(0)))
        vstore(depths, i, z)
        vscatter(conics, 3 * i, 3, where(ok, yy * inverse_det, F(0)))
        vscatter(conics, 3 * i + 1, 3, where(ok, -xy * inverse_det, F(0)))
        vscatter(conics, 3 * i + 2, 3, where(ok, xx * inverse_det, F(0)))
        vstore(compensations, i, where(ok, compensation, F(0)))


@inline
def _ellipse_gradient(ok, b0, b1, v_conic, compensation, v_compensation, eps2d, antialiased):
    """v of the rows of B, from those of the conic P = (B B^T + e 1)^-1 and of the compensation.

    v_B = -2 P V (P B), with V the symmetric matrix of half v_xy. In the needle's own direction P B is small and P is
    large, so P B is formed without cancellation: adj(B B^T) B has the rows b1 x n and n x b0. Of the compensation c,
    c^2 = det B B^T / det, the derivative is that of gsplat's include/Utils.cuh add_blur_vjp, with its 1e-6:
    v_B = v_c / (c + 1e-6) (e / det) ((trace + e) P B - B).
    """
    xx, xy, yy, det, _, n = _ellipse(b0, b1, eps2d)
    inverse = F(1) / where(ok, det, F(1))
    s0, s1 = _cross(b1, n), _cross(n, b0)
    w0, w1 = _sum(inverse, s0, inverse * eps2d, b0), _sum(inverse, s1, inverse * eps2d, b1)
    vxx, vxy, vyy = v_conic[0], v_conic[1] * F(0.5), v_conic[2]
    y0, y1 = _sum(vxx, w0, vxy, w1), _sum(vxy, w0, vyy, w1)
    k = inverse * F(-2)
    v0, v1 = _sum(k * yy, y0, -k * xy, y1), _sum(-k * xy, y0, k * xx, y1)
    if antialiased:
        k = v_compensation / (compensation + F(1e-6)) * inverse * eps2d
        r = k * (xx + yy - eps2d)
        c0, c1 = _sum(r, w0, -k, b0), _sum(r, w1, -k, b1)
        v0, v1 = _sum(F(1), v0, F(1), c0), _sum(F(1), v1, F(1), c1)
    return v0, v1


@inline
def _quaternion_gradient(q, scale, n):
    """v of the quaternion before normalisation, n = v of its rotation matrix; include/Utils.cuh quat_to_rotmat_vjp."""
    w, x, y, z = q
    vw = (x * (n[7] - n[5]) + y * (n[2] - n[6]) + z * (n[3] - n[1])) * F(2)
    vx = (y * (n[1] + n[3]) + z * (n[2] + n[6]) + w * (n[7] - n[5]) - x * (n[4] + n[8]) * F(2)) * F(2)
    vy = (x * (n[1] + n[3]) + z * (n[5] + n[7]) + w * (n[2] - n[6]) - y * (n[0] + n[8]) * F(2)) * F(2)
    vz = (x * (n[2] + n[6]) + y * (n[5] + n[7]) + w * (n[3] - n[1]) - z * (n[0] + n[4]) * F(2)) * F(2)
    along = vw * w + vx * x + vy * y + vz * z
    return (vw - along * w) * scale, (vx - along * x) * scale, (vy - along * y) * scale, (vz - along * z) * scale


@kernel
def project_backward(begin, end, chunk, means, quats, scales, radii, compensations, v_means2d, v_depths, v_conics,
                     v_compensations, v_means, v_quats, v_scales, v_view, view, K, width, height, eps2d,
                     antialiased):  # fmt: skip
    """Adds to v_means, v_quats, v_scales; row `chunk` of v_view receives the sum over this range for view[:3].

    Unseen Gaussians take part with harmless numbers in place of their own, which may be infinite.
    """
    frustum = _frustum(K, width, height)
    g00 = g01 = g02 = g03 = g10 = g11 = g12 = g13 = g20 = g21 = g22 = g23 = vsplat(F(0))
    for i in range(begin * LANES, end * LANES, LANES):
        ok = (vgather(radii, 2 * i, 2) > F(0)) & (vgather(radii, 2 * i + 1, 2) > F(0))
        if not any_lane(ok):
            continue
        # forward again: B = T m, m = r diag(s)
        p = _keep3(ok, _read3(means, i))
        x, y, z = _to_camera(view, p)
        inverse_z = F(1) / where(ok, z, F(1))
        u, v = x * inverse_z, y * inverse_z
        (jx, jxz, jy, jyz), t0, t1 = _jacobian(view, K, frustum, u, v, inverse_z)
        q = _read4(quats, i)
        q, norm = _unit4((where(ok, q[0], F(1)), where(ok, q[1], F(0)), where(ok, q[2], F(0)), where(ok, q[3], F(0))))
        r, s = _rotation(q), _keep3(ok, _read3(scales, i))
        m = _columns_times(r, s)
        # through the ellipse to B, then to m = T^T v_B, and from there to scales and rotation
        b0, b1 = _ellipse_gradient(
            ok, _row_times(t0, m), _row_times(t1, m), _keep3(ok, _read3(v_conics, i)),
            where(ok, vload(compensations, i), F(1)), where(ok, vload(v_compensations, i), F(0)), eps2d, antialiased,
        )  # fmt: skip
        n = (*_sum(t0[0], b0, t1[0], b1), *_sum(t0[1], b0, t1[1], b1), *_sum(t0[2], b0, t1[2], b1))
        _add3(v_scales, i, (n[0] * r[0] + n[3] * r[3] + n[6] * r[6], n[1] * r[1] + n[4] * r[4] + n[7] * r[7],
                            n[2] * r[2] + n[5] * r[5] + n[8] * r[8]))  # fmt: skip
        _add4(v_quats, i, _quaternion_gradient(q, norm, _columns_times(n, s)))
        # to T = J R, and to J
        transposed = (m[0], m[3], m[6], m[1], m[4], m[7], m[2], m[5], m[8])
        vt0, vt1 = _row_times(b0, transposed), _row_times(b1, transposed)
        v_jx = vt0[0] * view[0, 0] + vt0[1] * view[0, 1] + vt0[2] * view[0, 2]
        v_jxz = vt0[0] * view[2, 0] + vt0[1] * view[2, 1] + vt0[2] * view[2, 2]
        v_jy = vt1[0] * view[1, 0] + vt1[1] * view[1, 1] + vt1[2] * view[1, 2]
        v_jyz = vt1[0] * view[2, 0] + vt1[1] * view[2, 1] + vt1[2] * view[2, 2]
        # to the point in the camera, by its pixel, its depth and J; beyond the frustum jxz does not depend on x
        v_column = where(ok, vgather(v_means2d, 2 * i, 2), F(0))
        v_row = where(ok, vgather(v_means2d, 2 * i + 1, 2), F(0))
        inside_x, inside_y = (u >= frustum[0]) & (u <= frustum[1]), (v >= frustum[2]) & (v <= frustum[3])
        vx = jx * (v_column - where(inside_x, v_jxz * inverse_z, F(0)))
        vy = jy * (v_row - where(inside_y, v_jyz * inverse_z, F(0)))
        vz = jx * v_jx + jy * v_jy + jxz * v_jxz * where(inside_x, F(2), F(1))
        vz = -(vz + jyz * v_jyz * where(inside_y, F(2), F(1))) * inverse_z
        vz = vz + where(ok, vload(v_depths, i), F(0)) - jx * u * v_column - jy * v * v_row
        _add3(v_means, i, (vx * view[0, 0] + vy * view[1, 0] + vz * view[2, 0],
                           vx * view[0, 1] + vy * view[1, 1] + vz * view[2, 1],
                           vx * view[0, 2] + vy * view[1, 2] + vz * view[2, 2]))  # fmt: skip
        g00, g01, g02 = g00 + vx * p[0] + jx * vt0[0], g01 + vx * p[1] + jx * vt0[1], g02 + vx * p[2] + jx * vt0[2]
        g10, g11, g12 = g10 + vy * p[0] + jy * vt1[0], g11 + vy * p[1] + jy * vt1[1], g12 + vy * p[2] + jy * vt1[2]
        g20 = g20 + vz * p[0] + jxz * vt0[0] + jyz * vt1[0]
        g21 = g21 + vz * p[1] + jxz * vt0[1] + jyz * vt1[1]
        g22 = g22 + vz * p[2] + jxz * vt0[2] + jyz * vt1[2]
        g03, g13, g23 = g03 + vx, g13 + vy, g23 + vz
    store_sums(v_view, chunk * LANES, (g00, g01, g02, g03, g10, g11, g12, g13, g20, g21, g22, g23))


# ---------------------------------------------------------------- spherical harmonics


@inline
def _direction(p, eye):
    """Unit vectors from the eye to the points p, and the factor that made them so."""
    x, y, z = p[0] - eye[0], p[1] - eye[1], p[2] - eye[2]
    scale = F(1) / vmax(vsqrt(x * x + y * y + z * z), F(1e-12))
    return (x * scale, y * scale, z * scale), scale


@inline
def _load_rows(array, i, width, block):
    """block[16 m : 16 m + 16] = number m of the rows i .. i + 15, each of `width` floats."""
    whole = width // LANES * LANES
    for m in range(0, whole, LANES):
        transpose(array, i * width + m, width, block, m * LANES, LANES)
    for m in range(whole, width):
        vstore(block, m * LANES, vgather(array, i * width + m, width))


@inline
def _store_rows(array, i, width, block):
    """The way back."""
    whole = width // LANES * LANES
    for m in range(0, whole, LANES):
        transpose(block, m * LANES, LANES, array, i * width + m, width)
    for m in range(whole, width):
        vscatter(array, i * width + m, width, vload(block, m * LANES))


@inline
def _basis(degree, x, y, z, out):
    """The (degree + 1)^2 real spherical harmonics of a unit vector, in gsplat's order and signs.

    csrc/SphericalHarmonicsCUDA.cu; Sloan, Efficient Spherical Harmonic Evaluation (JCGT 2013).
    """
    vstore(out, 0, F(0.2820947917738781))
    if degree >= 1:
        vstore(out, 1 * LANES, y * F(-0.48860251190292))
        vstore(out, 2 * LANES, z * F(0.48860251190292))
        vstore(out, 3 * LANES, x * F(-0.48860251190292))
    if degree >= 2:
        c1, s1 = x * x - y * y, x * y * F(2)
        vstore(out, 4 * LANES, s1 * F(0.5462742152960395))
        vstore(out, 5 * LANES, y * z * F(-1.092548430592079))
        vstore(out, 6 * LANES, z * z * F(0.9461746957575601) - F(0.3153915652525201))
        vstore(out, 7 * LANES, x * z * F(-1.092548430592079))
        vstore(out, 8 * LANES, c1 * F(0.5462742152960395))
    if degree >= 3:
        vstore(out, 9 * LANES, (x * s1 + y * c1) * F(-0.5900435899266435))
        vstore(out, 10 * LANES, z * s1 * F(1.445305721320277))
        c = z * z * F(-2.285228997322329) + F(0.4570457994644658)
        vstore(out, 11 * LANES, y * c)
        vstore(out, 12 * LANES, z * (z * z * F(1.865881662950577) - F(1.119528997770346)))
        vstore(out, 13 * LANES, x * c)
        vstore(out, 14 * LANES, z * c1 * F(1.445305721320277))
        vstore(out, 15 * LANES, (x * c1 - y * s1) * F(-0.5900435899266435))


@inline
def _basis_slope(degree, x, y, z, d):
    """Gradient with respect to (x, y, z) of the sum over j of basis[j] d[j], where d[j] = d[16 j : 16 j + 16]."""
    vx = vload(d, 3 * LANES) * F(-0.48860251190292)
    vy = vload(d, 1 * LANES) * F(-0.48860251190292)
    vz = vload(d, 2 * LANES) * F(0.48860251190292)
    if degree >= 2:
        d4, d5, d6 = vload(d, 4 * LANES), vload(d, 5 * LANES), vload(d, 6 * LANES)
        d7, d8 = vload(d, 7 * LANES), vload(d, 8 * LANES)
        vx += (y * d4 + x * d8) * F(2 * 0.5462742152960395) + z * d7 * F(-1.092548430592079)
        vy += (x * d4 - y * d8) * F(2 * 0.5462742152960395) + z * d5 * F(-1.092548430592079)
        vz += (y * d5 + x * d7) * F(-1.092548430592079) + z * d6 * F(2 * 0.9461746957575601)
    if degree >= 3:
        c1, s1 = x * x - y * y, x * y * F(2)
        d9, d10, d11 = vload(d, 9 * LANES), vload(d, 10 * LANES), vload(d, 11 * LANES)
        d12, d13 = vload(d, 12 * LANES), vload(d, 13 * LANES)
        d14, d15 = vload(d, 14 * LANES), vload(d, 15 * LANES)
        c = z * z * F(-2.285228997322329) + F(0.4570457994644658)
        b = z * F(2 * 1.445305721320277)
        vx += (s1 * d9 + c1 * d15) * F(-3 * 0.5900435899266435) + b * (y * d10 + x * d14) + c * d13
        vy += (c1 * d9 - s1 * d15) * F(-3 * 0.5900435899266435) + b * (x * d10 - y * d14) + c * d11
        vz += (s1 * d10 + c1 * d14) * F(1.445305721320277) + z * (y * d11 + x * d13) * F(-2 * 2.285228997322329)
        vz += (z * z * F(3 * 1.865881662950577) - F(1.119528997770346)) * d12
    return vx, vy, vz


@kernel
def color(begin, end, chunk, means, coefficients, radii, colors, eye, degree, width):
    """colors = max(sum of basis[j] coefficients[j] + 1/2, 0), 0 for unseen ones; `width` floats are one row of these.

    The view direction runs from the camera's centre `eye` to the mean: rendering.py, csrc/SphericalHarmonicsCUDA.cu.
    """
    basis, block = _aligned(16 * LANES), _aligned(width * LANES)
    for i in range(begin * LANES, end * LANES, LANES):
        ok = (vgather(radii, 2 * i, 2) > F(0)) & (vgather(radii, 2 * i + 1, 2) > F(0))
        c0 = c1 = c2 = vsplat(F(0.5))
        if any_lane(ok):
            (x, y, z), _ = _direction(_read3(means, i), eye)
            _basis(degree, x, y, z, basis)
            _load_rows(coefficients, i, width, block)
            for j in range((degree + 1) * (degree + 1)):
                b, at = vload(basis, j * LANES), 3 * j * LANES
                c0 = fma(b, vload(block, at), c0)
                c1 = fma(b, vload(block, at + LANES), c1)
                c2 = fma(b, vload(block, at + 2 * LANES), c2)
        vscatter(colors, 3 * i, 3, where(ok, vmax(c0, F(0)), F(0)))
        vscatter(colors, 3 * i + 1, 3, where(ok, vmax(c1, F(0)), F(0)))
        vscatter(colors, 3 * i + 2, 3, where(ok, vmax(c2, F(0)), F(0)))


@kernel
def color_backward(begin, end, chunk, means, coefficients, radii, colors, v_colors, v_means, v_coefficients, v_eye,
                    eye, degree, width, add, bend):  # fmt: skip
    """Writes v_coefficients, or adds to them; adds to v_means, and row `chunk` of v_eye receives the sum for the eye.

    The last two only with `bend`: the means or the camera need a gradient, so that view directions matter.
    """
    basis, along = _aligned(16 * LANES), _aligned(16 * LANES)
    block, v_block = _aligned(width * LANES), _aligned(width * LANES)
    ex = ey = ez = vsplat(F(0))
    for i in range(begin * LANES, end * LANES, LANES):
        ok = (vgather(radii, 2 * i, 2) > F(0)) & (vgather(radii, 2 * i + 1, 2) > F(0))
        if not any_lane(ok):
            if not add:
                for at in range(i * width, (i + LANES) * width, LANES):
                    vstore(v_coefficients, at, F(0))
            continue
        lit, v = _read3(colors, i), _read3(v_colors, i)  # a colour cut off at 0 passes no gradient on
        v0, v1 = where(ok & (lit[0] > F(0)), v[0], F(0)), where(ok & (lit[1] > F(0)), v[1], F(0))
        v2 = where(ok & (lit[2] > F(0)), v[2], F(0))
        (x, y, z), scale = _direction(_keep3(ok, _read3(means, i)), eye)
        _basis(degree, x, y, z, basis)
        if add:
            _load_rows(v_coefficients, i, width, v_block)
        else:
            v_block[:] = 0
        if bend:
            _load_rows(coefficients, i, width, block)
        for j in range((degree + 1) * (degree + 1)):
            b, at = vload(basis, j * LANES), 3 * j * LANES
            vstore(v_block, at, fma(b, v0, vload(v_block, at)))
            vstore(v_block, at + LANES, fma(b, v1, vload(v_block, at + LANES)))
            vstore(v_block, at + 2 * LANES, fma(b, v2, vload(v_block, at + 2 * LANES)))
            if bend:
                c = (vload(block, at), vload(block, at + LANES), vload(block, at + 2 * LANES))
                vstore(along, j * LANES, _dot(c, (v0, v1, v2)))
        _store_rows(v_coefficients, i, width, v_block)
        if bend and degree >= 1:
            vx, vy, vz = _basis_slope(degree, x, y, z, along)
            radial = vx * x + vy * y + vz * z  # normalisation takes the part along the direction away
            vx, vy, vz = (vx - radial * x) * scale, (vy - radial * y) * scale, (vz - radial * z) * scale
            _add3(v_means, i, (vx, vy, vz))
            ex, ey, ez = ex - vx, ey - vy, ez - vz
    store_sums(v_eye, chunk * LANES, (ex, ey, ez))


# ---------------------------------------------------------------- records, depth order, tiles


@kernel
def pack(begin, end, chunk, means2d, conics, opacities, colors, radii, records, touched, channels, first, columns,
         rows):  # fmt: skip
    """Writes the records of Gaussians in cameras, and how many tiles each touches, of a grid of columns x rows.

    The ellipse where alpha = opacity exp(-sigma) reaches 1/255 has half extents sqrt(2 ln(255 opacity) covariance),
    the covariance being the inverse of the conic; it is made a trifle larger, since compositing tests again.
    Channels first .. first + 3 of `channels` go along.
    """
    record = _aligned(RECORD * LANES)
    record[:] = 0
    last_column, last_row = F(columns * TILE - 1), F(rows * TILE - 1)
    for i in range(begin * LANES, end * LANES, LANES):
        rx, ry = vgather(radii, 2 * i, 2), vgather(radii, 2 * i + 1, 2)
        ok = (rx > F(0)) & (ry > F(0))
        if not any_lane(ok):
            vscatter(touched, i, 1, F(0))
            continue
        x, y = vgather(means2d, 2 * i, 2), vgather(means2d, 2 * i + 1, 2)
        a, b, c = _read3(conics, i)
        opacity = vload(opacities, i)
        reach = vlog(where(ok, opacity, F(1)) * F(255))
        square = (vmax(reach, F(0)) * F(2.0002) + F(2e-4)) / vmax(a * c - b * b, F(1e-20))
        half_x, half_y = vmin(vsqrt(square * c) + F(0.01), rx), vmin(vsqrt(square * a) + F(0.01), ry)
        # the pixels whose centre, at + 1/2, lies within
        x0, x1 = vmax(vceil(x - half_x - F(0.5)), F(0)), vmin(vfloor(x + half_x - F(0.5)), last_column)
        y0, y1 = vmax(vceil(y - half_y - F(0.5)), F(0)), vmin(vfloor(y + half_y - F(0.5)), last_row)
        ok = ok & (x1 >= x0) & (y1 >= y0)
        tiles_x = vfloor(x1 * F(1 / TILE)) - vfloor(x0 * F(1 / TILE)) + F(1)
        tiles_y = vfloor(y1 * F(1 / TILE)) - vfloor(y0 * F(1 / TILE)) + F(1)
        vscatter(touched, i, 1, where(ok, tiles_x * tiles_y, F(0)))
        vstore(record, 0 * LANES, x)
        vstore(record, 1 * LANES, y)
        vstore(record, 2 * LANES, a)
        vstore(record, 3 * LANES, b)
        vstore(record, 4 * LANES, c)
        vstore(record, 5 * LANES, opacity)
        for k in range(min(4, channels - first)):
            vstore(record, (6 + k) * LANES, vgather(colors, i * channels + first + k, channels))
        vstore(record, 10 * LANES, reach)
        vstore(record, 12 * LANES, x0)
        vstore(record, 13 * LANES, x1)
        vstore(record, 14 * LANES, y0)
        vstore(record, 15 * LANES, y1)
        transpose(record, 0, LANES, records, i * RECORD, RECORD)


@kernel
def recolor(begin, end, chunk, colors, touched, records, channels, first):
    """Puts channels first .. first + 3 into the records."""
    for f in range(begin, end):
        if touched[f] > 0:
            for k in range(4):
                records[f * RECORD + 6 + k] = colors[f * channels + first + k] if first + k < channels else F(0)


@kernel
def sort_by_depth(begin, end, chunk, depths, touched, order, counts, n):
    """order[c n : c n + counts[c]]: the Gaussians that camera c sees, nearest first, equal depths by number.

    Radix sort by the bits of the depth, which for positive floats are in the order of the values (csrc/IntersectTile.cu
    does the same), less the smallest: two or three rounds of at most 11 bits.
    """
    for c in range(begin, end):
        bits = depths[c * n : (c + 1) * n].view(np.uint32)
        keys, index = np.empty(n, np.uint32), order[c * n : (c + 1) * n]
        low, high = np.uint32(0xFFFFFFFF), np.uint32(0)
        count = 0
        for i in range(n):
            if touched[c * n + i] > 0:
                keys[count] = bits[i]
                index[count] = c * n + i
                low, high = min(low, bits[i]), max(high, bits[i])
                count += 1
        counts[c] = count
        if count == 0:
            continue
        length = 0
        while length < 32 and np.uint64(high - low) >> np.uint64(length) != 0:
            length += 1
        rounds = max(1, (length + 10) // 11)
        width = (length + rounds - 1) // rounds
        place = np.empty(1 << width, np.int64)
        mask = np.uint32((1 << width) - 1)
        other_keys, other_index = np.empty(count, np.uint32), np.empty(count, np.int32)
        for r in range(rounds):
            shift = np.uint32(r * width)
            place[:] = 0
            for j in range(count):
                place[((keys[j] - low) >> shift) & mask] += 1
            total = 0
            for d in range(place.shape[0]):
                total, place[d] = total + place[d], total
            for j in range(count):
                d = ((keys[j] - low) >> shift) & mask
                other_keys[place[d]] = keys[j]
                other_index[place[d]] = index[j]
                place[d] += 1
            keys, other_keys = other_keys, keys
            index, other_index = other_index, index
        if rounds % 2 == 1:
            for j in range(count):
                order[c * n + j] = index[j]


@inline
def _tiles_of(records, f):
    """First and last column and row of tiles that Gaussian f touches."""
    at = f * RECORD
    return (np.int32(records[at + 12]) // TILE, np.int32(records[at + 13]) // TILE,
            np.int32(records[at + 14]) // TILE, np.int32(records[at + 15]) // TILE)  # fmt: skip


@kernel
def count_pairs(begin, end, chunk, ranges, order, records, counts, columns):
    """counts[q][tile]: the pairs of a tile with the Gaussians order[ranges[q, 0] : ranges[q, 1]]."""
    for q in range(begin, end):
        for r in range(ranges[q, 0], ranges[q, 1]):
            if r + 16 < ranges[q, 1]:
                prefetch(records, order[r + 16] * RECORD + 12)
            x0, x1, y0, y1 = _tiles_of(records, order[r])
            for y in range(y0, y1 + 1):
                for x in range(x0, x1 + 1):
                    counts[q, y * columns + x] += 1


@kernel
def list_pairs(begin, end, chunk, ranges, order, records, start, place, pairs, slots, columns):
    """Writes the pairs of each tile, in the order of depth, from place[q][tile] on: a stable counting sort.

    pairs: the Gaussian. slots: where the backward record of the pair goes, so that those of one Gaussian lie together.
    """
    for q in range(begin, end):
        for r in range(ranges[q, 0], ranges[q, 1]):
            if r + 16 < ranges[q, 1]:
                prefetch(records, order[r + 16] * RECORD + 12)
                prefetch(start, order[r + 16])
            f = order[r]
            slot = start[f]
            x0, x1, y0, y1 = _tiles_of(records, f)
            for y in range(y0, y1 + 1):
                for x in range(x0, x1 + 1):
                    at = place[q, y * columns + x]
                    place[q, y * columns + x] = at + 1
                    pairs[at] = f
                    slots[at] = slot
                    slot += 1


# ---------------------------------------------------------------- compositing
#
# A tile is kept in planes of 256 floats, each 16 blocks of 4x4 pixels, so that one vector is one block.


@inline
def _blocks_of(records, at, x, y):
    """First and last column and row of the blocks that a record touches, in the tile whose corner is pixel (x, y)."""
    return (max(np.int32(records[at + 12]) - x, 0) >> 2, min(np.int32(records[at + 13]) - x, TILE - 1) >> 2,
            max(np.int32(records[at + 14]) - y, 0) >> 2,
            min(np.int32(records[at + 15]) - y, TILE - 1) >> 2)  # fmt: skip


@inline
def _lane_of(x, y):
    """Where pixel (x, y) of a tile lies in a plane."""
    return ((y >> 2) * SIDE + (x >> 2)) * LANES + ((y & 3) << 2) + (x & 3)


# planes of the forward pass: transmittance (below 0: the pixel has ended), last contributor, four channels
LAST, COLOR = PIXELS, 2 * PIXELS


@kernel
def composite(begin, end, chunk, tiles, records, pairs, starts, backgrounds, image, alphas, transmittances, lasts,
              columns, rows, width, height, channels, first, alpha_max, divide):  # fmt: skip
    """Front to back: image = sum of alpha T colour + T_end background, T = product of 1 - alpha before.

    csrc/RasterizeToPixels3DGSFwd.cu. alpha = min(alpha_max, opacity exp(-sigma)); left out below 1/255; the Gaussian
    that would bring T to 1e-4 ends the pixel and is left out. lasts: number of the last contributor in its tile's list,
    or -1. divide: the last channel is depth, to be divided by 1 - T_end (rendering.py).
    """
    plane = _aligned(6 * PIXELS)
    live = np.empty(BLOCKS, np.bool_)
    for n in range(begin, end):
        tile = tiles[n]
        camera = tile // (columns * rows)
        y, x = TILE * (tile // columns % rows), TILE * (tile % columns)
        alive = _start_tile(plane, live, min(TILE, width - x), min(TILE, height - y))
        _composite_tile(plane, live, alive, records, pairs, starts[tile], starts[tile + 1], x, y, alpha_max)
        for j in range(min(TILE, height - y)):
            for i in range(min(TILE, width - x)):
                p, pixel = _lane_of(i, j), (camera * height + y + j) * width + x + i
                t = abs(plane[p])
                if first == 0:
                    transmittances[pixel], alphas[pixel] = t, F(1) - t
                    lasts[pixel] = np.int32(plane[LAST + p])
                for k in range(first, min(first + 4, channels)):
                    value = plane[COLOR + (k - first) * PIXELS + p]
                    if divide and k == channels - 1:
                        value /= max(F(1) - t, F(1e-10))
                    else:
                        value += t * backgrounds[camera * channels + k]
                    image[pixel * channels + k] = value


@inline
def _start_tile(plane, live, wide, high):
    """Clears the planes; pixels beyond the image have ended. Returns the number of blocks with a pixel inside."""
    for p in range(0, PIXELS, LANES):
        vstore(plane, LAST + p, F(-1))
        for k in range(4):
            vstore(plane, COLOR + k * PIXELS + p, F(0))
    alive = 0
    for block in range(BLOCKS):
        x, y = lane_column() + F(block % SIDE * 4), lane_row() + F(block // SIDE * 4)
        inside = (x < F(wide)) & (y < F(high))
        vstore(plane, block * LANES, where(inside, F(1), F(-1)))
        live[block] = any_lane(inside)
        alive += live[block]
    return alive


@inline
def _composite_tile(plane, live, alive, records, pairs, start, stop, x, y, alpha_max):
    for k in range(start, stop):
        if alive == 0:
            break
        if k + AHEAD < stop:
            prefetch(records, pairs[k + AHEAD] * RECORD)
        at = pairs[k] * RECORD
        mean_x, mean_y = records[at] - F(x) - F(0.5), records[at + 1] - F(y) - F(0.5)
        half_a, b, half_c = F(0.5) * records[at + 2], records[at + 3], F(0.5) * records[at + 4]
        opacity, reach = records[at + 5], records[at + 10] + F(1e-3)
        q0, q1, q2, q3 = records[at + 6], records[at + 7], records[at + 8], records[at + 9]
        x0, x1, y0, y1 = _blocks_of(records, at, x, y)
        for row in range(y0, y1 + 1):
            dy = (mean_y - F(row * 4)) - lane_row()
            c_dy2, b_dy = half_c * dy * dy, b * dy
            for column in range(x0, x1 + 1):
                block = row * SIDE + column
                if not live[block]:
                    continue
                p = block * LANES
                dx = (mean_x - F(column * 4)) - lane_column()
                sigma = fma(dx, fma(dx, half_a, b_dy), c_dy2)
                t = vload(plane, p)
                hit = (sigma <= reach) & (sigma >= F(0)) & (t > F(0))
                if not any_lane(hit):  # saves the exponential
                    continue
                alpha = vmin(vexp(-vmin(sigma, F(80))) * opacity, alpha_max)
                hit = hit & (alpha >= ALPHA_MIN)
                weight = where(hit, alpha * t, F(0))
                after = t - weight
                ends = hit & (after <= T_STOP)
                if any_lane(ends):
                    weight = where(ends, F(0), weight)
                    after = where(ends, -t, after)
                    hit = hit & (weight > F(0))
                    if not any_lane(after > F(0)):
                        live[block] = False
                        alive -= 1
                vstore(plane, p, after)
                vstore(plane, LAST + p, where(hit, F(k - start), vload(plane, LAST + p)))
                p += COLOR
                vstore(plane, p, fma(weight, q0, vload(plane, p)))
                vstore(plane, p + PIXELS, fma(weight, q1, vload(plane, p + PIXELS)))
                vstore(plane, p + 2 * PIXELS, fma(weight, q2, vload(plane, p + 2 * PIXELS)))
                vstore(plane, p + 3 * PIXELS, fma(weight, q3, vload(plane, p + 3 * PIXELS)))


# planes of the backward pass: transmittance, last contributor, what lies behind, gradients of four channels
BEHIND, V_COLOR = 2 * PIXELS, 3 * PIXELS


@kernel
def composite_backward(begin, end, chunk, tiles, records, pairs, slots, starts, backgrounds, divided, transmittances,
                       lasts, v_image, v_alphas, gradients, columns, rows, width, height, channels, first, alpha_max,
                       divide, absolute):  # fmt: skip
    """Back to front: writes the backward record of each pair of these tiles; csrc/RasterizeToPixels3DGSBwd.cu.

    With d = v_image . colour, the colours behind enter as one number per pixel,
    behind = sum over what is behind of d weight + T_end (v_image . background - v_alpha), and
    v_alpha_i = d_i T_i - behind / (1 - alpha_i),  v_sigma_i = -alpha_i v_alpha_i, 0 where alpha was cut at alpha_max.
    divided: the image, if `divide`, else nothing.
    """
    plane = _aligned(7 * PIXELS)
    deepest = np.empty(BLOCKS, np.int64)  # last contributor of a block
    for n in range(begin, end):
        tile = tiles[n]
        camera = tile // (columns * rows)
        y, x = TILE * (tile // columns % rows), TILE * (tile % columns)
        start, stop = starts[tile], starts[tile + 1]
        if start == stop:
            continue
        for p in range(0, 7 * PIXELS, LANES):
            vstore(plane, p, F(0))
        for p in range(0, PIXELS, LANES):
            vstore(plane, LAST + p, F(-1))
        deepest[:] = -1
        for j in range(min(TILE, height - y)):
            for i in range(min(TILE, width - x)):
                p, pixel = _lane_of(i, j), (camera * height + y + j) * width + x + i
                t = transmittances[pixel]
                plane[p], plane[LAST + p] = t, F(lasts[pixel])
                deepest[p // LANES] = max(deepest[p // LANES], lasts[pixel])
                end_v = -v_alphas[pixel] if first == 0 else F(0)  # gradient of T_end
                for k in range(first, min(first + 4, channels)):
                    v = v_image[pixel * channels + k]
                    if divide and k == channels - 1:  # depth / alpha
                        v /= max(F(1) - t, F(1e-10))
                        if F(1) - t > F(1e-10):
                            end_v += v * divided[pixel * channels + k]
                    else:
                        end_v += v * backgrounds[camera * channels + k]
                    plane[V_COLOR + (k - first) * PIXELS + p] = v
                plane[BEHIND + p] = t * end_v
        past = start + deepest.max() + 1
        for k in range(past, stop):
            vstore(gradients, slots[k] * RECORD, F(0))
        _composite_tile_backward(
            plane, deepest, records, pairs, slots, gradients, start, past, x, y, alpha_max, absolute
        )


@inline
def _composite_tile_backward(plane, deepest, records, pairs, slots, gradients, start, past, x, y, alpha_max, absolute):
    for k in range(past - 1, start - 1, -1):
        if k - AHEAD >= start:
            prefetch(records, pairs[k - AHEAD] * RECORD)
        at = pairs[k] * RECORD
        mean_x, mean_y = records[at] - F(x) - F(0.5), records[at + 1] - F(y) - F(0.5)
        a, b, c = records[at + 2], records[at + 3], records[at + 4]
        opacity, reach = records[at + 5], records[at + 10] + F(1e-3)
        q0, q1, q2, q3 = records[at + 6], records[at + 7], records[at + 8], records[at + 9]
        x0, x1, y0, y1 = _blocks_of(records, at, x, y)
        s = sx = sy = sxx = sxy = syy = c0 = c1 = c2 = c3 = abs_x = abs_y = vsplat(F(0))
        for row in range(y0, y1 + 1):
            dy = (mean_y - F(row * 4)) - lane_row()
            c_dy2, b_dy = F(0.5) * c * dy * dy, b * dy
            for column in range(x0, x1 + 1):
                block = row * SIDE + column
                if deepest[block] < k - start:
                    continue
                p = block * LANES
                dx = (mean_x - F(column * 4)) - lane_column()
                sigma = fma(dx, fma(dx, F(0.5) * a, b_dy), c_dy2)
                hit = (sigma <= reach) & (sigma >= F(0)) & (vload(plane, LAST + p) >= F(k - start))
                if not any_lane(hit):
                    continue
                bare = vexp(-vmin(sigma, F(80))) * opacity
                alpha = vmin(bare, alpha_max)
                hit = hit & (alpha >= ALPHA_MIN)
                alpha = where(hit, alpha, F(0))
                inverse = F(1) / (F(1) - alpha)
                t = vload(plane, p) * inverse
                vstore(plane, p, t)
                weight = alpha * t
                v0, v1 = vload(plane, V_COLOR + p), vload(plane, V_COLOR + PIXELS + p)
                v2, v3 = vload(plane, V_COLOR + 2 * PIXELS + p), vload(plane, V_COLOR + 3 * PIXELS + p)
                d = fma(v0, q0, fma(v1, q1, fma(v2, q2, v3 * q3)))
                behind = vload(plane, BEHIND + p)
                v_alpha = d * t - behind * inverse
                vstore(plane, BEHIND + p, fma(d, weight, behind))
                c0, c1, c2, c3 = fma(weight, v0, c0), fma(weight, v1, c1), fma(weight, v2, c2), fma(weight, v3, c3)
                v_sigma = where(hit & (bare <= alpha_max), -bare * v_alpha, F(0))
                vx, vy = v_sigma * dx, v_sigma * dy
                s, sx, sy = s + v_sigma, sx + vx, sy + vy
                sxx, sxy, syy = fma(vx, dx, sxx), fma(vx, dy, sxy), fma(vy, dy, syy)
                if absolute:
                    abs_x, abs_y = abs_x + vabs(vx * a + vy * b), abs_y + vabs(vx * b + vy * c)
        store_sums(gradients, slots[k] * RECORD, (s, sx, sy, sxx, sxy, syy, c0, c1, c2, c3, abs_x, abs_y))


@kernel
def add_pairs(begin, end, chunk, touched, start, records, gradients, v_means2d, v_conics, v_opacities, v_colors, v_abs,
              channels, first, absolute):  # fmt: skip
    """Adds up the backward records of each Gaussian in each camera; chain rule to the inputs of compositing.

    With more than four channels the geometry's gradients add up over the groups.
    """
    total = np.empty(LANES, np.float32)
    for f in range(begin, end):
        at = f * RECORD
        sums = vsplat(F(0))
        for slot in range(start[f], start[f] + touched[f]):
            sums = sums + vload(gradients, slot * RECORD)
        vstore(total, 0, sums)
        if touched[f] == 0:  # its record was never written
            a = b = c = F(0)
            opacity = F(1)
        else:
            a, b, c, opacity = records[at + 2], records[at + 3], records[at + 4], records[at + 5]
        if first == 0:
            v_means2d[2 * f] = v_means2d[2 * f + 1] = v_opacities[f] = F(0)
            v_conics[3 * f] = v_conics[3 * f + 1] = v_conics[3 * f + 2] = F(0)
            if absolute:
                v_abs[2 * f] = v_abs[2 * f + 1] = F(0)
        v_means2d[2 * f] += a * total[1] + b * total[2]
        v_means2d[2 * f + 1] += b * total[1] + c * total[2]
        v_conics[3 * f] += F(0.5) * total[3]
        v_conics[3 * f + 1] += total[4]
        v_conics[3 * f + 2] += F(0.5) * total[5]
        v_opacities[f] -= total[0] / opacity
        if absolute:
            v_abs[2 * f] += total[10]
            v_abs[2 * f + 1] += total[11]
        for k in range(first, min(first + 4, channels)):
            v_colors[f * channels + k] = total[6 + k - first]


@kernel
def background_backward(begin, end, chunk, v_image, transmittances, v_rows, width, channels):
    """v_rows: sum over each row of pixels of T_end v_image."""
    for row in range(begin, end):
        for k in range(channels):
            total = F(0)
            for pixel in range(row * width, (row + 1) * width):
                total += transmittances[pixel] * v_image[pixel * channels + k]
            v_rows[row * channels + k] = total
