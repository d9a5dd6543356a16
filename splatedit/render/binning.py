"""Which Gaussians touch which tile, nearest first: records, order of depth, lists of pairs."""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import math

import numpy as np

from splatedit.render.algebra import RECORD, F, aligned, inline, kernel
from splatedit.render.constants import TILE
from splatedit.render.simd import (
    LANES,
    any_lane,
    load2,
    load3,
    prefetch,
    store1,
    store4,
    stream_transposed,
    vceil,
    vfloor,
    vgather,
    vload,
    vlog,
    vmax,
    vmin,
    vsqrt,
    vstore,
    where,
)

LOG2_E, LN_255 = math.log2(math.e), math.log(255)
AHEAD = 16  # Gaussians to prefetch ahead


@kernel
def pack(begin, end, chunk, means2d, conics, opacities, colors, radii, records, boxes, touched, channels, columns,
         rows):  # fmt: skip
    """Writes the records of Gaussians in cameras, and which of columns x rows tiles each touches.

    The ellipse where alpha = opacity exp(-sigma) reaches 1/255 has half extents sqrt(2 ln(255 opacity) covariance),
    the covariance being the inverse of the conic; it is made a trifle larger, since compositing tests again.
    boxes: first and last column and row of tiles. touched: their number, 0 for one that is not seen, whose record and
    box are not written. The first four of `channels` go along.
    """
    record = aligned(RECORD * LANES)
    record[:] = 0
    last_column, last_row = F(columns * TILE - 1), F(rows * TILE - 1)
    for i in range(begin * LANES, end * LANES, LANES):
        rx, ry = load2(radii, 2 * i)
        ok = (rx > F(0)) & (ry > F(0))
        if not any_lane(ok):
            store1(touched, i, (F(0),))
            continue
        x, y = load2(means2d, 2 * i)
        a, b, c = load3(conics, 3 * i)
        log_opacity = vlog(where(ok, vload(opacities, i), F(1)))
        square = (vmax(log_opacity + F(LN_255), F(0)) * F(2.0002) + F(2e-4)) / vmax(a * c - b * b, F(1e-20))
        half_x, half_y = vmin(vsqrt(square * c) + F(0.01), rx), vmin(vsqrt(square * a) + F(0.01), ry)
        # the tiles with a pixel whose centre, at + 1/2, lies within
        x0, x1 = vmax(vceil(x - half_x - F(0.5)), F(0)), vmin(vfloor(x + half_x - F(0.5)), last_column)
        y0, y1 = vmax(vceil(y - half_y - F(0.5)), F(0)), vmin(vfloor(y + half_y - F(0.5)), last_row)
        ok = ok & (x1 >= x0) & (y1 >= y0)
        x0, x1 = where(ok, vfloor(x0 * F(1 / TILE)), F(0)), where(ok, vfloor(x1 * F(1 / TILE)), F(0))
        y0, y1 = where(ok, vfloor(y0 * F(1 / TILE)), F(0)), where(ok, vfloor(y1 * F(1 / TILE)), F(0))
        store4(boxes, 4 * i, (x0, x1, y0, y1))
        store1(touched, i, (where(ok, (x1 - x0 + F(1)) * (y1 - y0 + F(1)), F(0)),))
        vstore(record, 0 * LANES, x)
        vstore(record, 1 * LANES, y)
        vstore(record, 2 * LANES, a * F(-0.5 * LOG2_E))
        vstore(record, 3 * LANES, b * F(-LOG2_E))
        vstore(record, 4 * LANES, c * F(-0.5 * LOG2_E))
        vstore(record, 5 * LANES, log_opacity * F(LOG2_E))
        for k in range(min(4, channels)):
            vstore(record, (6 + k) * LANES, vgather(colors, i * channels + k, channels))
        vstore(record, 10 * LANES, -b / a)
        vstore(record, 11 * LANES, -b / c)
        for m in range(0, RECORD, LANES):
            stream_transposed(record, m * LANES, LANES, records, i * RECORD + m, RECORD)


@kernel
def recolor(begin, end, chunk, colors, touched, records, channels, first):
    """Puts channels first .. first + 3 into the records."""
    for f in range(begin, end):
        if touched[f] > 0:
            for k in range(4):
                records[f * RECORD + 6 + k] = colors[f * channels + first + k] if first + k < channels else F(0)


# Depths are sorted by their bits, which for positive floats are in the order of the values (csrc/IntersectTile.cu does
# the same), less the smallest. Equal depths stay in order of number.


@inline
def radix_sort(keys, order, length):
    """Sorts `order` by `keys`, of which the low `length` bits matter, in rounds of at most 11 bits; keys are lost."""
    count = len(keys)
    if count < 2 or length == 0:
        return
    rounds = (length + 10) // 11
    width = (length + rounds - 1) // rounds
    places, mask = np.empty(1 << width, np.int64), np.uint32((1 << width) - 1)
    a, x = keys, order
    b, y = np.empty(count, np.uint32), np.empty(count, np.int32)
    for r in range(rounds):
        shift = np.uint32(r * width)
        places[:] = 0
        for j in range(count):
            places[(a[j] >> shift) & mask] += 1
        total = 0
        for d in range(places.shape[0]):
            total, places[d] = total + places[d], total
        for j in range(count):
            d = (a[j] >> shift) & mask
            b[places[d]] = a[j]
            y[places[d]] = x[j]
            places[d] += 1
        a, b = b, a
        x, y = y, x
    if rounds % 2:
        order[:] = x


@kernel
def sort_by_depth(begin, end, chunk, bits, touched, order, counts, n):
    """order[c n : c n + counts[c]]: numbers of what camera c sees, nearest first."""
    for c in range(begin, end):
        keys = np.empty(n, np.uint32)
        low, high, count = np.uint32(0xFFFFFFFF), np.uint32(0), 0
        for i in range(c * n, (c + 1) * n):
            if touched[i] > 0:
                keys[count] = bits[i]
                order[c * n + count] = i
                low, high = min(low, bits[i]), max(high, bits[i])
                count += 1
        counts[c] = count
        length = 0
        while count > 0 and length < 32 and np.uint64(high - low) >> np.uint64(length) != 0:
            length += 1
        for j in range(count):
            keys[j] -= low
        radix_sort(keys[:count], order[c * n : c * n + count], length)


# A large scene goes first into buckets by the leading bits, each part of its Gaussians with places of its own in each
# bucket; then the buckets, which fit the nearest cache, are sorted. All steps run on several threads.


@kernel
def depth_bounds(begin, end, chunk, parts, bits, touched, bounds):
    """bounds[q]: number, least and largest bits of what is seen of the Gaussians parts[q, 0] .. parts[q, 1] - 1."""
    for q in range(begin, end):
        count, low, high = 0, np.uint32(0xFFFFFFFF), np.uint32(0)
        for i in range(parts[q, 0], parts[q, 1]):
            if touched[i] > 0:
                count += 1
                low, high = min(low, bits[i]), max(high, bits[i])
        bounds[q, 0], bounds[q, 1], bounds[q, 2] = count, low, high


@kernel
def count_buckets(begin, end, chunk, parts, bits, touched, low, shift, counts):
    """counts[q, k]: how many of part q belong into bucket k = (bits - low) >> shift."""
    for q in range(begin, end):
        for i in range(parts[q, 0], parts[q, 1]):
            if touched[i] > 0:
                counts[q, (bits[i] - low) >> shift] += 1


@kernel
def fill_buckets(begin, end, chunk, parts, bits, touched, low, shift, places, keys, order):
    """Keys and numbers of part q into its buckets, from places[q, k] on."""
    for q in range(begin, end):
        for i in range(parts[q, 0], parts[q, 1]):
            if touched[i] > 0:
                key = bits[i] - low
                at = places[q, key >> shift]
                places[q, key >> shift] = at + 1
                keys[at] = key
                order[at] = i


@kernel
def sort_buckets(begin, end, chunk, starts, keys, order, length):
    """Sorts the numbers order[starts[k] : starts[k + 1]] by the low `length` bits of their keys."""
    for k in range(begin, end):
        radix_sort(keys[starts[k] : starts[k + 1]], order[starts[k] : starts[k + 1]], length)


@kernel
def count_pairs(begin, end, chunk, ranges, order, boxes, counts, columns):
    """counts[q, tile]: how many of the Gaussians order[ranges[q, 0] : ranges[q, 1]] touch the tile."""
    for q in range(begin, end):
        for r in range(ranges[q, 0], ranges[q, 1]):
            if r + AHEAD < ranges[q, 1]:
                prefetch(boxes, order[r + AHEAD] * 4)
            at = np.int64(order[r]) * 4
            for y in range(boxes[at + 2], boxes[at + 3] + 1):
                for x in range(boxes[at], boxes[at + 1] + 1):
                    counts[q, y * columns + x] += 1


@kernel
def list_pairs(begin, end, chunk, ranges, order, boxes, start, place, pairs, columns):
    """Writes the pairs of each tile, in the order of depth, from place[q][tile] on: a stable counting sort.

    Of a pair: the Gaussian; and where its backward record goes, so that those of one Gaussian lie together.
    """
    for q in range(begin, end):
        for r in range(ranges[q, 0], ranges[q, 1]):
            if r + AHEAD < ranges[q, 1]:
                prefetch(boxes, order[r + AHEAD] * 4)
                prefetch(start, order[r + AHEAD])
            f = order[r]
            slot = start[f]
            at = np.int64(f) * 4
            for y in range(boxes[at + 2], boxes[at + 3] + 1):
                for x in range(boxes[at], boxes[at + 1] + 1):
                    k = place[q, y * columns + x]
                    place[q, y * columns + x] = k + 1
                    pairs[2 * k] = f
                    pairs[2 * k + 1] = slot
                    slot += 1
