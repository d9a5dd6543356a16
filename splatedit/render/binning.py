"""Which Gaussians touch which tile, nearest first: records, order of depth, lists of pairs."""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import math

import numpy as np

from splatedit.render.algebra import RECORD, F, aligned, kernel, read3
from splatedit.render.constants import TILE
from splatedit.render.simd import (
    LANES,
    any_lane,
    prefetch,
    stream_transposed,
    vceil,
    vfloor,
    vgather,
    vload,
    vlog,
    vmax,
    vmin,
    vscatter,
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
        rx, ry = vgather(radii, 2 * i, 2), vgather(radii, 2 * i + 1, 2)
        ok = (rx > F(0)) & (ry > F(0))
        if not any_lane(ok):
            vscatter(touched, i, 1, F(0))
            continue
        x, y = vgather(means2d, 2 * i, 2), vgather(means2d, 2 * i + 1, 2)
        a, b, c = read3(conics, i)
        log_opacity = vlog(where(ok, vload(opacities, i), F(1)))
        square = (vmax(log_opacity + F(LN_255), F(0)) * F(2.0002) + F(2e-4)) / vmax(a * c - b * b, F(1e-20))
        half_x, half_y = vmin(vsqrt(square * c) + F(0.01), rx), vmin(vsqrt(square * a) + F(0.01), ry)
        # the tiles with a pixel whose centre, at + 1/2, lies within
        x0, x1 = vmax(vceil(x - half_x - F(0.5)), F(0)), vmin(vfloor(x + half_x - F(0.5)), last_column)
        y0, y1 = vmax(vceil(y - half_y - F(0.5)), F(0)), vmin(vfloor(y + half_y - F(0.5)), last_row)
        ok = ok & (x1 >= x0) & (y1 >= y0)
        x0, x1 = where(ok, vfloor(x0 * F(1 / TILE)), F(0)), where(ok, vfloor(x1 * F(1 / TILE)), F(0))
        y0, y1 = where(ok, vfloor(y0 * F(1 / TILE)), F(0)), where(ok, vfloor(y1 * F(1 / TILE)), F(0))
        vscatter(boxes, 4 * i, 4, x0)
        vscatter(boxes, 4 * i + 1, 4, x1)
        vscatter(boxes, 4 * i + 2, 4, y0)
        vscatter(boxes, 4 * i + 3, 4, y1)
        vscatter(touched, i, 1, where(ok, (x1 - x0 + F(1)) * (y1 - y0 + F(1)), F(0)))
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
