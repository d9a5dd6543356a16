"""From the parameters of Gaussians to what one camera sees of them, and back: projection and colour in one pass.

Reading the parameters is most of the work of large scenes, 236 bytes each with three degrees of harmonics, so that both
are done while they are at hand.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from splatedit.render.algebra import (
    RECORD,
    F,
    aligned,
    columns_times,
    cross,
    dot,
    inline,
    keep3,
    kernel,
    mix,
    put3,
    put4,
    rotation,
    row_times,
    unit4,
)
from splatedit.render.constants import EXTEND as _EXTEND
from splatedit.render.harmonics import basis, basis_slope, direction, load_rows, store_rows
from splatedit.render.simd import (
    LANES,
    any_lane,
    fma,
    lane_bits,
    load2,
    load3,
    load4,
    store2,
    store3,
    store4,
    store_sums,
    vceil,
    vload,
    vlog,
    vmax,
    vmin,
    vsplat,
    vsqrt,
    vstore,
    vstream,
    where,
)

EXTEND = F(_EXTEND)  # equal in all versions of gsplat: may be frozen
RADIUS_MAX = F(2**30)  # pixels; a larger float has no int32


@inline
def to_camera(view, p):
    """view[:3, :3] p + view[:3, 3]."""
    x, y, z = p
    return (
        x * view[0, 0] + y * view[0, 1] + z * view[0, 2] + view[0, 3],
        x * view[1, 0] + y * view[1, 1] + z * view[1, 2] + view[1, 3],
        x * view[2, 0] + y * view[2, 1] + z * view[2, 2] + view[2, 3],
    )


@inline
def frustum(K, width, height):
    """Bounds of x / z and y / z: 15 % of the image beyond its edges, where the Jacobian stops changing."""
    margin_x, margin_y = F(0.15) * width / K[0, 0], F(0.15) * height / K[1, 1]
    return (-K[0, 2] / K[0, 0] - margin_x, (width - K[0, 2]) / K[0, 0] + margin_x,
            -K[1, 2] / K[1, 1] - margin_y, (height - K[1, 2]) / K[1, 1] + margin_y)  # fmt: skip


@inline
def jacobian(view, K, frustum, u, v, inverse_z):
    """Derivatives of the pixel: J = [jx 0 jxz; 0 jy jyz] by the point in the camera, T = J R by that in the world."""
    jx, jy = inverse_z * K[0, 0], inverse_z * K[1, 1]
    jxz, jyz = -jx * vmin(vmax(u, frustum[0]), frustum[1]), -jy * vmin(vmax(v, frustum[2]), frustum[3])
    t0 = (jx * view[0, 0] + jxz * view[2, 0], jx * view[0, 1] + jxz * view[2, 1], jx * view[0, 2] + jxz * view[2, 2])
    t1 = (jy * view[1, 0] + jyz * view[2, 0], jy * view[1, 1] + jyz * view[2, 1], jy * view[1, 2] + jyz * view[2, 2])
    return (jx, jxz, jy, jyz), t0, t1


@inline
def ellipse(b0, b1, eps2d):
    """xx, xy, yy and determinant of B B^T + eps2d 1, determinant of B B^T, cross product n of the rows of B.

    det B B^T = n . n, and det(A + e 1) = det A + e trace A + e^2: free of the cancellation that in float32 makes
    xx yy - xy xy pure noise for a needle.
    """
    xx, xy, yy, n = dot(b0, b0), dot(b0, b1), dot(b1, b1), cross(b0, b1)
    sharp = dot(n, n)
    return xx + eps2d, xy, yy + eps2d, sharp + (xx + yy + eps2d) * eps2d, sharp, n


@inline
def ellipse_gradient(ok, b0, b1, v_conic, v_dimmed, opacity, eps2d, antialiased, least):
    """v of the rows of B, and of the opacity, from those of the conic P = (B B^T + e 1)^-1 and of the dimmed opacity.

    v_B = -2 P V (P B), with V the symmetric matrix of half v_xy. In the needle's own direction P B is small and P is
    large, so P B is formed without cancellation: adj(B B^T) B has the rows b1 x n and n x b0. Of the compensation c,
    c^2 = det B B^T / det, the derivative is that of gsplat's include/Utils.cuh add_blur_vjp, with its 1e-6:
    v_B = v_c / (c + 1e-6) (e / det) ((trace + e) P B - B).
    """
    xx, xy, yy, det, sharp, n = ellipse(b0, b1, eps2d)
    inverse = F(1) / where(ok, det, F(1))
    s0, s1 = cross(b1, n), cross(n, b0)
    w0, w1 = mix(inverse, s0, inverse * eps2d, b0), mix(inverse, s1, inverse * eps2d, b1)
    vxx, vxy, vyy = v_conic[0], v_conic[1] * F(0.5), v_conic[2]
    y0, y1 = mix(vxx, w0, vxy, w1), mix(vxy, w0, vyy, w1)
    k = inverse * F(-2)
    v0, v1 = mix(k * yy, y0, -k * xy, y1), mix(-k * xy, y0, k * xx, y1)
    v_opacity = v_dimmed
    if antialiased:
        compensation = vsqrt(vmax(sharp * inverse, least * least))
        v_opacity = v_dimmed * compensation
        k = v_dimmed * opacity / (compensation + F(1e-6)) * inverse * eps2d
        r = k * (xx + yy - eps2d)
        c0, c1 = mix(r, w0, -k, b0), mix(r, w1, -k, b1)
        v0, v1 = mix(F(1), v0, F(1), c0), mix(F(1), v1, F(1), c1)
    return v0, v1, v_opacity


@inline
def quaternion_gradient(q, scale, n):
    """v of the quaternion before normalisation, n = v of its rotation matrix; include/Utils.cuh quat_to_rotmat_vjp."""
    w, x, y, z = q
    vw = (x * (n[7] - n[5]) + y * (n[2] - n[6]) + z * (n[3] - n[1])) * F(2)
    vx = (y * (n[1] + n[3]) + z * (n[2] + n[6]) + w * (n[7] - n[5]) - x * (n[4] + n[8]) * F(2)) * F(2)
    vy = (x * (n[1] + n[3]) + z * (n[5] + n[7]) + w * (n[2] - n[6]) - y * (n[0] + n[8]) * F(2)) * F(2)
    vz = (x * (n[2] + n[6]) + y * (n[5] + n[7]) + w * (n[3] - n[1]) - z * (n[0] + n[4]) * F(2)) * F(2)
    along = vw * w + vx * x + vy * y + vz * z
    return (vw - along * w) * scale, (vx - along * x) * scale, (vy - along * y) * scale, (vz - along * z) * scale


@inline
def shade(p, eye, coefficients, i, degree, floats, harmonics, block):
    """The sum of basis[j] coefficients[j] + 1/2 for Gaussians i .. at p, of which a row has `floats` numbers.

    The view direction runs from the camera's centre `eye` to the mean: rendering.py, csrc/SphericalHarmonicsCUDA.cu.
    """
    (x, y, z), _ = direction(p, eye)
    basis(degree, x, y, z, harmonics)
    load_rows(coefficients, i, floats, block)
    c0 = c1 = c2 = vsplat(F(0.5))
    for j in range((degree + 1) * (degree + 1)):
        b, at = vload(harmonics, j * LANES), 3 * j * LANES
        c0 = fma(b, vload(block, at), c0)
        c1 = fma(b, vload(block, at + LANES), c1)
        c2 = fma(b, vload(block, at + 2 * LANES), c2)
    return c0, c1, c2


@inline
def shade_backward(ok, p, v, eye, coefficients, v_coefficients, i, degree, floats, add, wanted, bend, stream, scratch):
    """v of the means, from v of the colours; writes v of the coefficients, or adds to them, if `wanted`.

    With `bend` the means or the camera need a gradient, so that view directions matter.
    """
    harmonics, along, block, v_block = scratch
    (x, y, z), scale = direction(p, eye)
    basis(degree, x, y, z, harmonics)
    if wanted and add:
        load_rows(v_coefficients, i, floats, v_block)
    else:
        v_block[:] = 0
    if bend:
        load_rows(coefficients, i, floats, block)
    for j in range((degree + 1) * (degree + 1)):
        b, at = vload(harmonics, j * LANES), 3 * j * LANES
        if wanted:
            vstore(v_block, at, fma(b, v[0], vload(v_block, at)))
            vstore(v_block, at + LANES, fma(b, v[1], vload(v_block, at + LANES)))
            vstore(v_block, at + 2 * LANES, fma(b, v[2], vload(v_block, at + 2 * LANES)))
        if bend:
            c = (vload(block, at), vload(block, at + LANES), vload(block, at + 2 * LANES))
            vstore(along, j * LANES, dot(c, v))
    if wanted:
        store_rows(v_coefficients, i, floats, v_block, stream)
    vx = vy = vz = vsplat(F(0))
    if bend and degree >= 1:
        vx, vy, vz = basis_slope(degree, x, y, z, along)
        radial = vx * x + vy * y + vz * z  # normalisation takes the part along the direction away
        vx, vy, vz = (vx - radial * x) * scale, (vy - radial * y) * scale, (vz - radial * z) * scale
    return keep3(ok, (vx, vy, vz))


@kernel
def project(begin, end, chunk, means, quats, scales, opacities, coefficients, radii, means2d, depths, conics, dimmed,
            colors, odd, view, K, eye, width, height, eps2d, near, far, clip, antialiased, least, degree, floats,
            channels):  # fmt: skip
    """EWA projection into one camera: csrc/ProjectionEWA3DGSFused.cu, include/Utils.cuh (persp_proj, add_blur).

    With B = T rot(q) diag(s) the covariance on screen is B B^T + eps2d 1, the conic its inverse, the compensation
    sqrt(det B B^T / det(B B^T + eps2d 1)), no less than `least`. A Gaussian that cannot be seen gets radii 0.
    With degree >= 0 colours are made from the rows of `floats` coefficients; with four channels the last is the depth.
    odd[chunk] becomes 1 if a number of this range is infinite or NaN, or a quaternion 0.
    """
    limits = frustum(K, width, height)
    harmonics, block = aligned(16 * LANES), aligned(floats * LANES)
    strange = vsplat(F(0))
    for i in range(begin * LANES, end * LANES, LANES):
        p, s = load3(means, 3 * i), load3(scales, 3 * i)
        x, y, z = to_camera(view, p)
        ok = (z >= near) & (z <= far)
        inverse_z = F(1) / where(ok, z, F(1))
        u, v = x * inverse_z, y * inverse_z
        column, row = u * K[0, 0] + K[0, 2], v * K[1, 1] + K[1, 2]
        _, t0, t1 = jacobian(view, K, limits, u, v, inverse_z)
        q, norm = unit4(load4(quats, 4 * i))
        m = columns_times(rotation(q), s)
        xx, xy, yy, det, sharp, _ = ellipse(row_times(t0, m), row_times(t1, m), eps2d)
        ok = ok & (det > F(0)) & (det < F(1e38))
        inverse_det = F(1) / where(ok, det, F(1))
        opacity = vload(opacities, i)
        strange = strange + (norm + opacity) * F(0) + (p[0] + p[1] + p[2]) * F(0) + (s[0] + s[1] + s[2]) * F(0)
        if antialiased:
            opacity = opacity * vsqrt(vmax(sharp * inverse_det, least * least))
        seen = ok & (opacity * F(255) >= F(1))
        extend = vmin(vsqrt(vlog(where(seen, opacity * F(255), F(1))) * F(2)), EXTEND)
        rx, ry = vmin(vceil(extend * vsqrt(xx)), RADIUS_MAX), vmin(vceil(extend * vsqrt(yy)), RADIUS_MAX)
        seen = seen & ((rx > clip) | (ry > clip))
        seen = seen & (column + rx > F(0)) & (column - rx < width) & (row + ry > F(0)) & (row - ry < height)
        store2(radii, 2 * i, (where(seen, rx, F(0)), where(seen, ry, F(0))))
        store2(means2d, 2 * i, (where(ok, column, F(0)), where(ok, row, F(0))))
        vstore(depths, i, z)
        put3(conics, i, keep3(ok, (yy * inverse_det, -xy * inverse_det, xx * inverse_det)), False)
        vstore(dimmed, i, where(ok, opacity, F(0)))
        if degree >= 0:
            c = (vsplat(F(0)), vsplat(F(0)), vsplat(F(0)))
            if any_lane(seen):
                c = shade(p, eye, coefficients, i, degree, floats, harmonics, block)
                strange = strange + (c[0] + c[1] + c[2]) * F(0)
            c = keep3(seen, (vmax(c[0], F(0)), vmax(c[1], F(0)), vmax(c[2], F(0))))
            if channels == 4:
                store4(colors, 4 * i, (c[0], c[1], c[2], z))
            else:
                store3(colors, 3 * i, c)
    if lane_bits(strange >= F(0)) != (1 << LANES) - 1:  # 0, or NaN where one of them was not finite
        odd[chunk] = 1


@inline
def color_gradient(ok, colors, v_colors, i, channels):
    """v of the colours, and of the depth if it is a channel; a colour that was cut off at 0 passes none on."""
    v_depth = vsplat(F(0))
    if channels == 4:
        lit0, lit1, lit2, _ = load4(colors, 4 * i)
        v0, v1, v2, v_depth = load4(v_colors, 4 * i)
    else:
        lit0, lit1, lit2 = load3(colors, 3 * i)
        v0, v1, v2 = load3(v_colors, 3 * i)
    return (where(ok & (lit0 > F(0)), v0, F(0)), where(ok & (lit1 > F(0)), v1, F(0)),
            where(ok & (lit2 > F(0)), v2, F(0))), v_depth  # fmt: skip


@inline
def put_nothing(v_means, v_quats, v_scales, v_opacities, v_coefficients, i, floats, wanted, stream):
    zero = vsplat(F(0))
    put3(v_means, i, (zero, zero, zero), False)
    put4(v_quats, i, (zero, zero, zero, zero), False)
    put3(v_scales, i, (zero, zero, zero), False)
    vstore(v_opacities, i, zero)
    if wanted:
        for at in range(i * floats, (i + LANES) * floats, LANES):
            if stream:
                vstream(v_coefficients, at, zero)
            else:
                vstore(v_coefficients, at, zero)


@kernel
def project_backward(begin, end, chunk, means, quats, scales, opacities, coefficients, radii, colors, v_means2d,
                     v_depths, v_conics, v_dimmed, v_colors, v_means, v_quats, v_scales, v_opacities, v_coefficients,
                     v_camera, view, K, eye, width, height, eps2d, antialiased, least, degree, floats, channels, add,
                     wanted, bend, stream):  # fmt: skip
    """Writes v_means, v_quats, v_scales, v_opacities, v_coefficients, or adds to them.

    Row `chunk` of v_camera receives the sums over this range for view[:3], and for the eye. Unseen Gaussians take part
    with harmless numbers in place of their own. Coefficients get a gradient if `wanted`, past the cache if `stream`.
    """
    limits = frustum(K, width, height)
    scratch = (aligned(16 * LANES), aligned(16 * LANES), aligned(floats * LANES), aligned(floats * LANES))
    g00 = g01 = g02 = g03 = g10 = g11 = g12 = g13 = g20 = g21 = g22 = g23 = ex = ey = ez = vsplat(F(0))
    for i in range(begin * LANES, end * LANES, LANES):
        rx, ry = load2(radii, 2 * i)
        ok = (rx > F(0)) & (ry > F(0))
        if not any_lane(ok):
            if not add:
                put_nothing(v_means, v_quats, v_scales, v_opacities, v_coefficients, i, floats, wanted, stream)
            continue
        # forward again: B = T m, m = r diag(s)
        p = keep3(ok, load3(means, 3 * i))
        x, y, z = to_camera(view, p)
        inverse_z = F(1) / where(ok, z, F(1))
        u, v = x * inverse_z, y * inverse_z
        (jx, jxz, jy, jyz), t0, t1 = jacobian(view, K, limits, u, v, inverse_z)
        q = load4(quats, 4 * i)
        q, norm = unit4((where(ok, q[0], F(1)), where(ok, q[1], F(0)), where(ok, q[2], F(0)), where(ok, q[3], F(0))))
        r, s = rotation(q), keep3(ok, load3(scales, 3 * i))
        m = columns_times(r, s)
        # through the ellipse to B, then to m = T^T v_B, and from there to scales and rotation
        b0, b1, v_opacity = ellipse_gradient(
            ok, row_times(t0, m), row_times(t1, m), keep3(ok, load3(v_conics, 3 * i)),
            where(ok, vload(v_dimmed, i), F(0)), vload(opacities, i), eps2d, antialiased, least,
        )  # fmt: skip
        n = (*mix(t0[0], b0, t1[0], b1), *mix(t0[1], b0, t1[1], b1), *mix(t0[2], b0, t1[2], b1))
        put3(v_scales, i, (n[0] * r[0] + n[3] * r[3] + n[6] * r[6], n[1] * r[1] + n[4] * r[4] + n[7] * r[7],
                           n[2] * r[2] + n[5] * r[5] + n[8] * r[8]), add)  # fmt: skip
        put4(v_quats, i, quaternion_gradient(q, norm, columns_times(n, s)), add)
        vstore(v_opacities, i, v_opacity + (vload(v_opacities, i) if add else vsplat(F(0))))
        # to T = J R, and to J
        transposed = (m[0], m[3], m[6], m[1], m[4], m[7], m[2], m[5], m[8])
        vt0, vt1 = row_times(b0, transposed), row_times(b1, transposed)
        v_jx = vt0[0] * view[0, 0] + vt0[1] * view[0, 1] + vt0[2] * view[0, 2]
        v_jxz = vt0[0] * view[2, 0] + vt0[1] * view[2, 1] + vt0[2] * view[2, 2]
        v_jy = vt1[0] * view[1, 0] + vt1[1] * view[1, 1] + vt1[2] * view[1, 2]
        v_jyz = vt1[0] * view[2, 0] + vt1[1] * view[2, 1] + vt1[2] * view[2, 2]
        # to the point in the camera, by its pixel, its depth and J; beyond the frustum jxz does not depend on x
        v_column, v_row = load2(v_means2d, 2 * i)
        v_column, v_row = where(ok, v_column, F(0)), where(ok, v_row, F(0))
        inside_x, inside_y = (u >= limits[0]) & (u <= limits[1]), (v >= limits[2]) & (v <= limits[3])
        vx = jx * (v_column - where(inside_x, v_jxz * inverse_z, F(0)))
        vy = jy * (v_row - where(inside_y, v_jyz * inverse_z, F(0)))
        vz = jx * v_jx + jy * v_jy + jxz * v_jxz * where(inside_x, F(2), F(1))
        vz = -(vz + jyz * v_jyz * where(inside_y, F(2), F(1))) * inverse_z
        v_depth, v_color = vload(v_depths, i), (vsplat(F(0)), vsplat(F(0)), vsplat(F(0)))
        if degree >= 0:
            v_color, v_channel = color_gradient(ok, colors, v_colors, i, channels)
            v_depth = v_depth + v_channel
        vz = vz + where(ok, v_depth, F(0)) - jx * u * v_column - jy * v * v_row
        v_mean = (vx * view[0, 0] + vy * view[1, 0] + vz * view[2, 0],
                  vx * view[0, 1] + vy * view[1, 1] + vz * view[2, 1],
                  vx * view[0, 2] + vy * view[1, 2] + vz * view[2, 2])  # fmt: skip
        g00, g01, g02 = g00 + vx * p[0] + jx * vt0[0], g01 + vx * p[1] + jx * vt0[1], g02 + vx * p[2] + jx * vt0[2]
        g10, g11, g12 = g10 + vy * p[0] + jy * vt1[0], g11 + vy * p[1] + jy * vt1[1], g12 + vy * p[2] + jy * vt1[2]
        g20 = g20 + vz * p[0] + jxz * vt0[0] + jyz * vt1[0]
        g21 = g21 + vz * p[1] + jxz * vt0[1] + jyz * vt1[1]
        g22 = g22 + vz * p[2] + jxz * vt0[2] + jyz * vt1[2]
        g03, g13, g23 = g03 + vx, g13 + vy, g23 + vz
        if degree >= 0:
            a = shade_backward(ok, p, v_color, eye, coefficients, v_coefficients, i, degree, floats, add, wanted, bend,
                               stream, scratch)  # fmt: skip
            v_mean = mix(F(1), v_mean, F(1), a)
            ex, ey, ez = ex - a[0], ey - a[1], ez - a[2]
        put3(v_means, i, v_mean, add)
    store_sums(v_camera, chunk * RECORD, (g00, g01, g02, g03, g10, g11, g12, g13, g20, g21, g22, g23, ex, ey, ez))
