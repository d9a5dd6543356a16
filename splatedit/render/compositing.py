"""Compositing and its backward: the pixels of a tile, front to back and back to front.

A tile has 16 blocks of 4x4 pixels, numbered along rows. It is kept in planes of 256 floats, block after block, so that
one block is one vector with AVX-512, two with AVX, four with SSE and NEON. An integer with a bit for each block says
which blocks a Gaussian reaches: loops run over the bits that are set, and one set for nothing costs less than a branch
guessed wrong. Sources are places in gsplat 1.5.3, under gsplat/cuda.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import math

import numpy as np

from splatedit.render.algebra import RECORD, F, aligned, inline, kernel
from splatedit.render.constants import ALPHA_MIN as _ALPHA_MIN
from splatedit.render.constants import T_STOP as _T_STOP
from splatedit.render.constants import TILE
from splatedit.render.simd import (
    LANES,
    any_lane,
    copy_quad,
    count_bits,
    fma,
    lane_bits,
    lane_column,
    lane_row,
    lowest_bit,
    prefetch,
    store_sums,
    transpose_quads,
    vabs,
    vexp2,
    vload,
    vmax,
    vmin,
    vsplat,
    vstore,
    where,
)

T_STOP = F(_T_STOP)
EXPONENT_MIN = F(math.log2(_ALPHA_MIN))  # of a contribution
LN2 = F(math.log(2))

PIXELS = TILE * TILE
BLOCKS = PIXELS // 16
ROWS = LANES // 4  # of a block, in one vector
AHEAD = 12  # records to prefetch ahead
GROUP = 128  # pairs whose blocks are found before they are composited; their records stay in the nearest cache
NEVER = np.int32(2**24)  # where a pixel's list has not ended: beyond any list, and exact as a float

# planes: transmittance, in the forward pass below 0 where the pixel has ended; number in the tile's list of the
# Gaussian that ended it, or NEVER; column and row of the pixel; four channels, or their gradients; what lies behind
END, COLUMN, ROW, CHANNELS, BEHIND = (k * PIXELS for k in (1, 2, 3, 4, 8))


@inline
def _coordinates(plane):
    for p in range(0, PIXELS, LANES):
        block = p // 16
        vstore(plane, COLUMN + p, lane_column() + F(block % 4 * 4))
        vstore(plane, ROW + p, lane_row() + F(block // 4 * 4 + p % 16 // 4))


@inline
def _exponent(records, at, mean_x, mean_y, plane, p):
    """dx, dy, log2 of alpha before it is cut, and whether that is a contribution."""
    dx, dy = mean_x - vload(plane, COLUMN + p), mean_y - vload(plane, ROW + p)
    top = records[at + 5]
    e = fma(dx, fma(dx, records[at + 2], dy * records[at + 3]), fma(dy * records[at + 4], dy, vsplat(top)))
    return dx, dy, e, (e >= EXPONENT_MIN) & (e <= top)


# ---------------------------------------------------------------- forward


@kernel
def composite(begin, end, chunk, tiles, records, pairs, starts, masks, backgrounds, image, alphas, transmittances, ends,
              columns, rows, width, height, channels, first, alpha_max, divide, hits):  # fmt: skip
    """Front to back: image = sum of alpha T colour + T_end background, T = product of 1 - alpha before.

    csrc/RasterizeToPixels3DGSFwd.cu. alpha = min(alpha_max, opacity exp(-sigma)); left out below 1/255; the Gaussian
    that would bring T to 1e-4 ends the pixel and is left out. Leaves behind, for the backward pass, the blocks to which
    each pair contributed in `masks`, and T and the end of each pixel. divide: the last channel is depth, to be divided
    by 1 - T_end (rendering.py).

    hits: None; or int32 for each pair, to have the pixels counted to which it contributes. Colours are not looked at
    then: `image` gets the largest weight alpha T of a pixel, and the number in the tile's list of whose it is.
    """
    plane = aligned(9 * PIXELS)
    _coordinates(plane)
    for n in range(begin, end):
        tile = tiles[n]
        camera = tile // (columns * rows)
        y, x = TILE * (tile // columns % rows), TILE * (tile % columns)
        live = _start_tile(plane, width - x, height - y)
        stop = starts[tile + 1]
        for group in range(starts[tile], stop, GROUP):
            past = min(group + GROUP, stop)
            if live == 0:
                masks[group:stop] = 0
                break
            _find_blocks(masks, records, pairs, group, past, stop, x, y)
            live = _composite_group(
                plane, live, masks, records, pairs, group, past, starts[tile], x, y, alpha_max, hits
            )
        _finish_tile(plane, backgrounds, camera, channels, first, divide)
        corner = (camera * height + y) * width + x
        whole = x + TILE <= width and y + TILE <= height
        if first == 0:
            _write_plane(plane, 0, transmittances, corner, width, height - y, width - x, whole)
            for p in range(0, PIXELS, LANES):
                vstore(plane, p, F(1) - vload(plane, p))
            _write_plane(plane, 0, alphas, corner, width, height - y, width - x, whole)
            _write_plane(plane, END, ends, corner, width, height - y, width - x, whole)
        _write_image(plane, image, corner, width, height - y, width - x, whole, channels, first)


@inline
def _start_tile(plane, wide, high):
    """Clears the planes; pixels beyond the image have ended. Returns the blocks with a pixel inside."""
    live = 0
    for p in range(0, PIXELS, LANES):
        inside = (vload(plane, COLUMN + p) < F(wide)) & (vload(plane, ROW + p) < F(high))
        vstore(plane, p, where(inside, F(1), F(-1)))
        vstore(plane, END + p, F(NEVER))
        for k in range(4):
            vstore(plane, CHANNELS + k * PIXELS + p, F(0))
        live |= np.int64(any_lane(inside)) << (p // 16)
    return live


@inline
def _find_blocks(masks, records, pairs, start, past, stop, x, y):
    """masks[k]: the blocks within which the Gaussian of pair k reaches alpha 1/255.

    A lane is a block. The least q = -(A dx^2 + B dx dy + C dy^2) over the rectangle of a block's pixel centres is 0 if
    the mean lies inside; else it lies on one of the two sides that face the mean, each a parabola to minimise.
    """
    for k in range(start, past):
        if k + AHEAD < stop:
            prefetch(records, pairs[2 * (k + AHEAD)] * RECORD)
        at = pairs[2 * k] * RECORD
        mean_x, mean_y = records[at] - F(x) - F(3.5), records[at + 1] - F(y) - F(3.5)
        a, b, c, reach = records[at + 2], records[at + 3], records[at + 4], EXPONENT_MIN - records[at + 5] - F(2e-3)
        found = 0
        for s in range(0, BLOCKS, LANES):
            x0, y0 = mean_x - lane_column() * F(4), mean_y - (lane_row() + F(s // 4)) * F(4)
            x1, y1 = x0 + F(3), y0 + F(3)
            side_x, side_y = vmax(vmin(x1, F(0)), x0), vmax(vmin(y1, F(0)), y0)
            best_x = vmax(vmin(side_y * records[at + 10], x1), x0)
            best_y = vmax(vmin(side_x * records[at + 11], y1), y0)
            along_x = fma(best_x, fma(best_x, a, side_y * b), side_y * side_y * c)
            along_y = fma(side_x, fma(side_x, a, best_y * b), best_y * best_y * c)
            found |= lane_bits(vmax(along_x, along_y) >= reach) << s
        masks[k] = found


@inline
def _composite_group(plane, live, masks, records, pairs, start, past, list_start, x, y, alpha_max, hits):
    """Returns the blocks that still have a pixel that has not ended."""
    for k in range(start, past):
        bits = np.int64(masks[k]) & live
        at = pairs[2 * k] * RECORD
        mean_x, mean_y = records[at] - F(x) - F(0.5), records[at + 1] - F(y) - F(0.5)
        q0, q1, q2, q3 = records[at + 6], records[at + 7], records[at + 8], records[at + 9]
        contributed = count = 0
        while bits != 0:
            block = lowest_bit(bits)
            bits &= bits - 1
            for p in range(block * 16, block * 16 + 16, LANES):
                _, _, e, hit = _exponent(records, at, mean_x, mean_y, plane, p)
                t = vload(plane, p)
                hit = hit & (t > F(0))
                weight = where(hit, vmin(vexp2(e), alpha_max) * t, F(0))
                after = t - weight
                ends = hit & (after <= T_STOP)
                if any_lane(ends):
                    weight = where(ends, F(0), weight)
                    hit = hit & (weight > F(0))
                    after = where(ends, -t, after)
                    vstore(plane, END + p, where(ends, F(k - list_start), vload(plane, END + p)))
                    live &= ~(np.int64(not _any_left(plane, p, after)) << block)
                contributed |= np.int64(any_lane(hit)) << block
                vstore(plane, p, after)
                c = p + CHANNELS
                if hits is None:  # known when this is compiled
                    vstore(plane, c, fma(weight, q0, vload(plane, c)))
                    vstore(plane, c + PIXELS, fma(weight, q1, vload(plane, c + PIXELS)))
                    vstore(plane, c + 2 * PIXELS, fma(weight, q2, vload(plane, c + 2 * PIXELS)))
                    vstore(plane, c + 3 * PIXELS, fma(weight, q3, vload(plane, c + 3 * PIXELS)))
                else:
                    best = vload(plane, c)
                    vstore(plane, c, vmax(weight, best))
                    number = where(weight > best, F(k - list_start), vload(plane, c + PIXELS))
                    vstore(plane, c + PIXELS, number)
                    count += count_bits(lane_bits(hit))
        masks[k] = contributed
        if hits is not None:
            hits[k] = count
    return live


@inline
def _any_left(plane, p, after):
    """Whether a pixel of the block has not ended, of which the vector at p has just become `after`."""
    vstore(plane, p, after)
    left = False
    block = p // 16 * 16
    for other in range(block, block + 16, LANES):
        left |= any_lane(vload(plane, other) > F(0))
    return left


@inline
def _finish_tile(plane, backgrounds, camera, channels, first, divide):
    """Transmittances become positive; channels get their background, depth its division."""
    for p in range(0, PIXELS, LANES):
        t = vabs(vload(plane, p))
        vstore(plane, p, t)
        for k in range(first, min(first + 4, channels)):
            at = CHANNELS + (k - first) * PIXELS + p
            if divide and k == channels - 1:
                vstore(plane, at, vload(plane, at) / vmax(F(1) - t, F(1e-10)))
            else:
                vstore(plane, at, fma(t, vsplat(backgrounds[camera * channels + k]), vload(plane, at)))


@inline
def _lane_of(x, y):
    """Where pixel (x, y) of a tile lies in a plane."""
    return ((y >> 2) * 4 + (x >> 2)) * 16 + ((y & 3) << 2) + (x & 3)


@inline
def _write_plane(plane, at, target, corner, width, high, wide, whole):
    """One plane to the pixels of the tile whose first pixel is number `corner`, in rows of `width` pixels."""
    if whole:
        for j in range(TILE):
            for i in range(0, TILE, 4):
                copy_quad(plane, at + _lane_of(i, j), target, corner + j * width + i)
    else:
        for j in range(min(TILE, high)):
            for i in range(min(TILE, wide)):
                target[corner + j * width + i] = plane[at + _lane_of(i, j)]


@inline
def _write_image(plane, image, corner, width, high, wide, whole, channels, first):
    if whole and channels == 4:
        for j in range(TILE):
            for i in range(0, TILE, 4):
                p = CHANNELS + _lane_of(i, j)
                transpose_quads(plane, p, PIXELS, image, (corner + j * width + i) * 4, 4)
    else:
        for j in range(min(TILE, high)):
            for i in range(min(TILE, wide)):
                for k in range(first, min(first + 4, channels)):
                    value = plane[CHANNELS + (k - first) * PIXELS + _lane_of(i, j)]
                    image[(corner + j * width + i) * channels + k] = value


# ---------------------------------------------------------------- backward


@kernel
def composite_backward(begin, end, chunk, tiles, records, pairs, starts, masks, backgrounds, divided,
                       transmittances, ends, v_image, v_alphas, gradients, columns, rows, width, height, channels,
                       first, alpha_max, divide, absolute):  # fmt: skip
    """Back to front: writes the backward record of each pair of these tiles; csrc/RasterizeToPixels3DGSBwd.cu.

    With d = v_image . colour, the colours behind enter as one number per pixel,
    behind = sum over what is behind of d weight + T_end (v_image . background - v_alpha), and
    v_alpha_i = d_i T_i - behind / (1 - alpha_i),  v_sigma_i = -alpha_i v_alpha_i, 0 where alpha was cut at alpha_max.
    divided: the image, if `divide`, else nothing.
    """
    plane = aligned(9 * PIXELS)
    _coordinates(plane)
    for n in range(begin, end):
        tile = tiles[n]
        camera = tile // (columns * rows)
        y, x = TILE * (tile // columns % rows), TILE * (tile % columns)
        start, stop = starts[tile], starts[tile + 1]
        if start == stop:
            continue
        corner = (camera * height + y) * width + x
        whole = x + TILE <= width and y + TILE <= height
        if not whole:
            for p in range(0, 9 * PIXELS, LANES):
                if p < COLUMN or p >= CHANNELS:
                    vstore(plane, p, F(0))
        _read_plane(plane, 0, transmittances, corner, width, height - y, width - x, whole)
        _read_plane(plane, END, ends, corner, width, height - y, width - x, whole)
        if first == 0:
            _read_plane(plane, BEHIND, v_alphas, corner, width, height - y, width - x, whole)
        else:
            for p in range(0, PIXELS, LANES):
                vstore(plane, BEHIND + p, F(0))
        _read_image(plane, v_image, corner, width, height - y, width - x, whole, channels, first)
        if divide and first + 4 >= channels:
            _divide_backward(plane, divided, corner, width, height - y, width - x, channels, first)
        _start_behind(plane, backgrounds, camera, channels, first, divide)
        _composite_list_backward(plane, masks, records, pairs, gradients, start, stop, x, y, alpha_max, absolute)


@inline
def _read_plane(plane, at, source, corner, width, high, wide, whole):
    if whole:
        for j in range(TILE):
            for i in range(0, TILE, 4):
                copy_quad(source, corner + j * width + i, plane, at + _lane_of(i, j))
    else:
        for j in range(min(TILE, high)):
            for i in range(min(TILE, wide)):
                plane[at + _lane_of(i, j)] = source[corner + j * width + i]


@inline
def _read_image(plane, image, corner, width, high, wide, whole, channels, first):
    if whole and channels == 4:
        for j in range(TILE):
            for i in range(0, TILE, 4):
                p = CHANNELS + _lane_of(i, j)
                transpose_quads(image, (corner + j * width + i) * 4, 4, plane, p, PIXELS)
    else:
        for p in range(CHANNELS, BEHIND, LANES):
            vstore(plane, p, F(0))
        for j in range(min(TILE, high)):
            for i in range(min(TILE, wide)):
                for k in range(first, min(first + 4, channels)):
                    value = image[(corner + j * width + i) * channels + k]
                    plane[CHANNELS + (k - first) * PIXELS + _lane_of(i, j)] = value


@inline
def _divide_backward(plane, divided, corner, width, high, wide, channels, first):
    """The last channel was divided by alpha = 1 - T_end: its gradient is too, and alpha gets one."""
    k = CHANNELS + (channels - 1 - first) * PIXELS
    for j in range(min(TILE, high)):
        for i in range(min(TILE, wide)):
            p = _lane_of(i, j)
            alpha = F(1) - plane[p]
            v = plane[k + p] / max(alpha, F(1e-10))
            plane[k + p] = v
            if alpha > F(1e-10):
                plane[BEHIND + p] -= v * divided[(corner + j * width + i) * channels + channels - 1]


@inline
def _start_behind(plane, backgrounds, camera, channels, first, divide):
    """Gradient of T_end, times T_end."""
    for p in range(0, PIXELS, LANES):
        v = -vload(plane, BEHIND + p)
        for k in range(first, min(first + 4, channels)):
            if not (divide and k == channels - 1):
                v = fma(
                    vload(plane, CHANNELS + (k - first) * PIXELS + p), vsplat(backgrounds[camera * channels + k]), v
                )
        vstore(plane, BEHIND + p, v * vload(plane, p))


@inline
def _composite_list_backward(plane, masks, records, pairs, gradients, start, stop, x, y, alpha_max, absolute):
    for k in range(stop - 1, start - 1, -1):
        if k - AHEAD >= start:
            prefetch(records, pairs[2 * (k - AHEAD)] * RECORD)
        bits = np.int64(masks[k])
        at = pairs[2 * k] * RECORD
        mean_x, mean_y = records[at] - F(x) - F(0.5), records[at + 1] - F(y) - F(0.5)
        q0, q1, q2, q3 = records[at + 6], records[at + 7], records[at + 8], records[at + 9]
        s = sx = sy = sxx = sxy = syy = c0 = c1 = c2 = c3 = abs_x = abs_y = vsplat(F(0))
        while bits != 0:
            block = lowest_bit(bits)
            bits &= bits - 1
            for p in range(block * 16, block * 16 + 16, LANES):
                dx, dy, e, hit = _exponent(records, at, mean_x, mean_y, plane, p)
                hit = hit & (vload(plane, END + p) > F(k - start))
                bare = vexp2(e)
                alpha = where(hit, vmin(bare, alpha_max), F(0))
                inverse = F(1) / (F(1) - alpha)
                t = vload(plane, p) * inverse
                vstore(plane, p, t)
                weight = alpha * t
                c = p + CHANNELS
                v0, v1 = vload(plane, c), vload(plane, c + PIXELS)
                v2, v3 = vload(plane, c + 2 * PIXELS), vload(plane, c + 3 * PIXELS)
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
                    a, b, c_ = -F(2) * LN2 * records[at + 2], -LN2 * records[at + 3], -F(2) * LN2 * records[at + 4]
                    abs_x, abs_y = abs_x + vabs(vx * a + vy * b), abs_y + vabs(vx * b + vy * c_)
        store_sums(gradients, pairs[2 * k + 1] * RECORD, (s, sx, sy, sxx, sxy, syy, c0, c1, c2, c3, abs_x, abs_y))


@kernel
def add_pairs(begin, end, chunk, touched, start, records, gradients, opacities, v_means2d, v_conics, v_opacities,
              v_colors, v_abs, channels, first, absolute):  # fmt: skip
    """Adds up the backward records of each Gaussian in each camera; chain rule to the inputs of compositing.

    With more than four channels the geometry's gradients add up over the groups.
    """
    total = np.empty(16, np.float32)
    for f in range(begin, end):
        at = f * RECORD
        for j in range(0, 16, LANES):
            sums = vsplat(F(0))
            for slot in range(start[f], start[f] + touched[f]):
                sums = sums + vload(gradients, slot * RECORD + j)
            vstore(total, j, sums)
        if touched[f] == 0:  # its record was never written
            a = b = c = F(0)
            opacity = F(1)
        else:
            a, b, c = -F(2) * LN2 * records[at + 2], -LN2 * records[at + 3], -F(2) * LN2 * records[at + 4]
            opacity = opacities[f]
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
