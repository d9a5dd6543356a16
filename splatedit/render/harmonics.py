"""Real spherical harmonics of a direction, their slopes, and the rows of coefficients they weigh."""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from splatedit.render.algebra import F, inline
from splatedit.render.simd import (
    LANES,
    prefetch,
    stream_transposed,
    transpose,
    vgather,
    vload,
    vmax,
    vscatter,
    vsqrt,
    vstore,
)


@inline
def direction(p, eye):
    """Unit vectors from the eye to the points p, and the factor that made them so."""
    x, y, z = p[0] - eye[0], p[1] - eye[1], p[2] - eye[2]
    scale = F(1) / vmax(vsqrt(x * x + y * y + z * z), F(1e-12))
    return (x * scale, y * scale, z * scale), scale


@inline
def load_rows(array, i, width, block):
    """block[LANES m : LANES (m + 1)] = number m of the LANES rows from i on, each of `width` floats.

    The rows that come next are asked for: hardware looks ahead no farther than a page, which holds 21 rows of degree 3.
    """
    for at in range((i + LANES) * width, (i + 2 * LANES) * width, 16):
        prefetch(array, at)
    whole = width // LANES * LANES
    for m in range(0, whole, LANES):
        transpose(array, i * width + m, width, block, m * LANES, LANES)
    for m in range(whole, width):
        vstore(block, m * LANES, vgather(array, i * width + m, width))


@inline
def store_rows(array, i, width, block, stream):
    """The way back; past the cache if `stream`: rows are whole cache lines, and not read again soon."""
    whole = width // LANES * LANES
    for m in range(0, whole, LANES):
        if stream:
            stream_transposed(block, m * LANES, LANES, array, i * width + m, width)
        else:
            transpose(block, m * LANES, LANES, array, i * width + m, width)
    for m in range(whole, width):
        vscatter(array, i * width + m, width, vload(block, m * LANES))


@inline
def basis(degree, x, y, z, out):
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
def basis_slope(degree, x, y, z, d):
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
