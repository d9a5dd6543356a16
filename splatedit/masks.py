"""Which Gaussians an edit may change: frozen objects, `mask(gaussians) -> (n,) bool`, that combine by `&`, `|`, `~`.

    paw = (Box((0, 0.4, 0), (0.5, 0.2, 0.5)) & Rule("opacity", ">", 0.5)).grow(0.02)

Boxes, spheres and rules fit any scene, rows and relevance only the one they were made for. `mask_files` reads and
writes them.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splatedit.errors import InputError
from splatedit.gaussians import SH_C0, Gaussians
from splatedit.matching import TOLERANCES, Print, as_float32, fingerprint, match


class Mask:
    """What all masks can do; a mask is True for the Gaussians that an edit may change."""

    def __call__(self, gaussians: Gaussians) -> Tensor:
        """(n,) bool, on the device of the Gaussians. Raises InputError where the mask cannot be of this scene."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        return All((self, other))

    def __or__(self, other: Mask) -> Mask:
        return Some((self, other))

    def __invert__(self) -> Mask:
        return Not(self)

    def grow(self, radius: float) -> Mask:
        """And all within `radius` of one of its Gaussians, centre to centre, world units."""
        return Grown(self, radius)

    def shrink(self, radius: float) -> Mask:
        """Only those with no Gaussian outside within `radius`, centre to centre, world units."""
        return Not(Grown(Not(self), radius))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))  # type: ignore[arg-type]

    __hash__ = None  # pyright: ignore[reportAssignmentType]


# -------------------------------------------------------------------------------- by numbers
@dataclass(frozen=True, eq=False)
class Box(Mask):
    """Centres within a box, its faces included; world units. rotation: w x y z, how the box is turned, any length."""

    centre: Sequence[float]
    size: Sequence[float]  # whole edges along the box's own axes
    rotation: Sequence[float] = (1.0, 0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        for name, count in (("centre", 3), ("size", 3), ("rotation", 4)):
            object.__setattr__(self, name, numbers(getattr(self, name), count, f"box: {name}"))
        if min(self.size) <= 0:
            raise InputError(f"box: found edges {list(self.size)}, expected three lengths above 0.")
        if not any(self.rotation):
            raise InputError("box: the rotation is 0 0 0 0, expected a quaternion w x y z of any other length.")

    def __call__(self, gaussians: Gaussians) -> Tensor:
        from scipy.spatial.transform import Rotation

        means = gaussians.means.detach().double()
        w, *xyz = self.rotation
        axes = means.new_tensor(Rotation.from_quat([*xyz, w]).as_matrix())
        inside = (means - means.new_tensor(self.centre)) @ axes
        return (inside.abs() <= means.new_tensor(self.size) / 2).all(1)

    def __str__(self) -> str:
        turned = "" if self.rotation[1:] == (0, 0, 0) else f", turned by the quaternion {plain(self.rotation)}"
        return f"box around {plain(self.centre)} of {plain(self.size)}{turned}"


@dataclass(frozen=True, eq=False)
class Sphere(Mask):
    """Centres within a ball, its surface included; world units."""

    centre: Sequence[float]
    radius: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "centre", numbers(self.centre, 3, "sphere: centre"))
        object.__setattr__(self, "radius", length(self.radius, "sphere: radius"))

    def __call__(self, gaussians: Gaussians) -> Tensor:
        means = gaussians.means.detach().double()
        return (means - means.new_tensor(self.centre)).square().sum(1) <= self.radius**2

    def __str__(self) -> str:
        return f"sphere around {plain(self.centre)} of radius {self.radius:g}"


def base_color(gaussians: Gaussians) -> Tensor:
    """Colours (n, 3) in [0, 1] without what depends on the view."""
    return (0.5 + SH_C0 * gaussians.sh0[:, 0].detach().double()).clamp(0, 1)


QUANTITIES: dict[str, Callable[[Gaussians], Tensor]] = {
    "opacity": lambda g: g.opacities.detach().double().sigmoid(),  # in [0, 1]
    "scale": lambda g: g.scales.detach().double().exp().amax(1),  # standard deviation of the longest axis, world units
    "red": lambda g: base_color(g)[:, 0],
    "green": lambda g: base_color(g)[:, 1],
    "blue": lambda g: base_color(g)[:, 2],
    "x": lambda g: g.means[:, 0].detach().double(),
    "y": lambda g: g.means[:, 1].detach().double(),
    "z": lambda g: g.means[:, 2].detach().double(),
}
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
COLOR = re.compile(r"colou?r\(([^()]*)\)")


@dataclass(frozen=True, eq=False)
class Rule(Mask):
    """Compare one number of each Gaussian: `Rule("opacity", "<", 0.1)`.

    quantity: a key of QUANTITIES; `color(r,g,b)`, the distance of the colour from that one, both in [0, 1]; or the name
    of an extra column of the splat file. sign: a key of OPERATORS.
    """

    quantity: str
    sign: str
    value: float

    def __post_init__(self) -> None:
        if not isinstance(self.quantity, str) or not self.quantity:
            raise InputError(f"rule: found {self.quantity!r}, expected one of {', '.join(QUANTITIES)}.")
        if self.sign not in OPERATORS:
            raise InputError(f"rule: found {self.sign!r}, expected one of {' '.join(OPERATORS)}.")
        object.__setattr__(self, "value", numbers([self.value], 1, f"rule: {self.quantity}")[0])
        self.color()

    def color(self) -> tuple[float, ...] | None:
        """Red, green, blue that the distance is from; None for any other quantity."""
        said = COLOR.fullmatch(self.quantity)
        if not said:
            return None
        given = numbers(said[1].split(","), 3, f"rule: {self.quantity}")
        if not all(0 <= v <= 1 for v in given):
            raise InputError(f"rule: found {self.quantity}, expected red, green, blue in [0, 1].")
        return given

    def values(self, gaussians: Gaussians) -> Tensor:
        """The number (n,) that is compared; raises InputError for a scene without it."""
        color = self.color()
        if color is not None:
            colors = base_color(gaussians)
            return (colors - colors.new_tensor(color)).norm(dim=1)
        if self.quantity in QUANTITIES:
            return QUANTITIES[self.quantity](gaussians)
        if self.quantity in gaussians.extra:
            column = gaussians.extra[self.quantity].astype(np.float64)
            return torch.from_numpy(column).to(gaussians.means.device)
        columns = f", or a further column of the scene: {', '.join(gaussians.extra)}" if gaussians.extra else ""
        known = ", ".join((*QUANTITIES, "color(r,g,b)"))
        raise InputError(f"rule: {self.quantity!r} is not known; expected one of {known}{columns}.")

    def __call__(self, gaussians: Gaussians) -> Tensor:
        return OPERATORS[self.sign](self.values(gaussians), self.value)

    def __str__(self) -> str:
        return f"{self.quantity} {self.sign} {self.value:g}"


def box(text: str) -> Box:
    """`cx,cy,cz,sx,sy,sz`, perhaps with a quaternion `,w,x,y,z`; raises InputError."""
    given = numbers(text.split(","), (6, 10), "mask_box", "cx,cy,cz,sx,sy,sz, perhaps with a quaternion ,w,x,y,z")
    return Box(given[:3], given[3:6], given[6:] or (1.0, 0.0, 0.0, 0.0))


def sphere(text: str) -> Sphere:
    """`x,y,z,r`; raises InputError."""
    *centre, radius = numbers(text.split(","), 4, "mask_sphere", "x,y,z,r")
    return Sphere(centre, radius)


def rule(text: str) -> Mask:
    """Comparisons joined by `and` and `or`, as in `opacity > 0.5 and z < 1`; `and` binds harder; raises InputError."""
    some = [[comparison(part) for part in re.split(r"\s+and\s+", side)] for side in re.split(r"\s+or\s+", text.strip())]
    sides = [part[0] if len(part) == 1 else All(tuple(part)) for part in some]
    return sides[0] if len(sides) == 1 else Some(tuple(sides))


def comparison(text: str) -> Rule:
    """One comparison, `opacity < 0.1`."""
    signs = "|".join(map(re.escape, OPERATORS))
    said = re.fullmatch(rf"\s*(\w+\s*\([^()]*\)|\w+)\s*({signs})\s*([^\s<>=!]+)\s*", text)
    if not said:
        raise InputError(f"mask_rule: found {text!r}, expected a comparison, as in: opacity < 0.1, or x >= -1.5")
    return Rule(re.sub(r"\s", "", said[1]).replace("colour(", "color("), said[2], said[3])  # type: ignore


# -------------------------------------------------------------------------------- by rows
@dataclass(frozen=True, eq=False)
class Indices(Mask):
    """Rows of one scene. rows: whole numbers from 0. of: how many Gaussians that scene has, None if not known."""

    rows: np.ndarray
    of: int | None = None
    name: str = ""  # of the file they come from

    def __post_init__(self) -> None:
        rows = np.asarray(self.rows)
        if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
            raise InputError(f"{self.name or 'rows'}: found {rows.dtype} {list(rows.shape)}, expected a list of rows.")
        if rows.size and (rows.min() < 0 or rows.max() >= 2**31):
            wrong = rows[(rows < 0) | (rows >= 2**31)][0]
            raise InputError(f"{self.name or 'rows'}: found row {wrong}, expected whole numbers from 0.")
        object.__setattr__(self, "rows", frozen(np.unique(rows).astype(np.int64)))

    def __call__(self, gaussians: Gaussians) -> Tensor:
        name, n = self.name or "rows", gaussians.n
        if self.of not in (None, n):
            raise InputError(f"{name}: made for a scene of {self.of:,} Gaussians, this one has {n:,}.")
        if len(self.rows) and self.rows[-1] >= n:
            raise InputError(f"{name}: found row {self.rows[-1]}, but the scene has {n:,} Gaussians, 0 to {n - 1}.")
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[torch.from_numpy(self.rows.copy())] = True
        return chosen.to(gaussians.means.device)

    def __str__(self) -> str:
        return f"rows of {self.name}" if self.name else "rows"


@dataclass(frozen=True, eq=False)
class Matching(Mask):
    """The Gaussians that a second splat holds, such as a selection saved apart; see `matching.match`."""

    points: np.ndarray  # (k, 3) float64
    looks: np.ndarray  # (k, 7) float32, see matching.Print
    tolerance: np.ndarray  # (k,) float64, world units
    name: str = ""  # of the file they come from

    def __post_init__(self) -> None:
        shapes = {"points": (3,), "looks": (7,), "tolerance": ()}
        for key, shape in shapes.items():
            array = np.asarray(getattr(self, key))
            fits = array.shape == (len(np.atleast_1d(self.points)), *shape) and np.issubdtype(array.dtype, np.number)
            if not fits or not np.isfinite(array).all():
                raise InputError(
                    f"matching: {key} of shape {list(array.shape)}, expected k rows of {shape or 1} numbers."
                )
            object.__setattr__(self, key, frozen(array.astype(np.float32 if key == "looks" else np.float64)))

    @classmethod
    def of(cls, gaussians: Gaussians, kind: str = "ply", name: str = "") -> Matching:
        """A mask of these Gaussians, as read from a file of that kind, a key of formats.FORMATS."""
        points, looks = fingerprint(gaussians)
        return cls(points, looks, TOLERANCES.get(kind, as_float32)(points), name)

    def found(self, gaussians: Gaussians) -> np.ndarray:
        """The row (k,) of the scene that each one is, -1 for those that are not there."""
        return match(fingerprint(gaussians), Print(self.points, self.looks), self.tolerance)

    def __call__(self, gaussians: Gaussians) -> Tensor:
        rows = self.found(gaussians)
        chosen = torch.zeros(gaussians.n, dtype=torch.bool)
        chosen[torch.from_numpy(rows[rows >= 0])] = True
        return chosen.to(gaussians.means.device)

    def __str__(self) -> str:
        return f"in {self.name or 'a second splat'} ({len(self.points):,} Gaussians)"


@dataclass(frozen=True, eq=False)
class Relevance(Mask):
    """Gaussians whose relevance exceeds a threshold; `relevance.relevance` measures it. Of one scene only."""

    values: np.ndarray  # (n,) float32, about 0 to 1
    threshold: float
    name: str = ""  # what it is the relevance for

    def __post_init__(self) -> None:
        values = np.asarray(self.values)
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.number) or not np.isfinite(values).all():
            raise InputError(
                f"relevance: found {values.dtype} {list(values.shape)}, expected a list of finite numbers."
            )
        object.__setattr__(self, "values", frozen(values.astype(np.float32)))
        object.__setattr__(self, "threshold", numbers([self.threshold], 1, "relevance: threshold")[0])

    def __call__(self, gaussians: Gaussians) -> Tensor:
        if len(self.values) != gaussians.n:
            found = f"of a scene of {len(self.values):,} Gaussians, this one has {gaussians.n:,}"
            raise InputError(f"relevance: {found}; measure it again.")
        return torch.from_numpy(self.values > self.threshold).to(gaussians.means.device)

    def __str__(self) -> str:
        return f"relevance{f' of {self.name}' if self.name else ''} > {self.threshold:.3g}"


# -------------------------------------------------------------------------------- combined
@dataclass(frozen=True, eq=False)
class All(Mask):
    """What every one of some masks has."""

    masks: Sequence[Mask]

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", several(self.masks))

    def __call__(self, gaussians: Gaussians) -> Tensor:
        return torch.stack([mask(gaussians) for mask in self.masks]).all(0)

    def __str__(self) -> str:
        return "all of these"


@dataclass(frozen=True, eq=False)
class Some(Mask):
    """What any one of some masks has."""

    masks: Sequence[Mask]

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", several(self.masks))

    def __call__(self, gaussians: Gaussians) -> Tensor:
        return torch.stack([mask(gaussians) for mask in self.masks]).any(0)

    def __str__(self) -> str:
        return "any of these"


@dataclass(frozen=True, eq=False)
class Not(Mask):
    """What a mask has not."""

    mask: Mask

    def __post_init__(self) -> None:
        several([self.mask])

    def __call__(self, gaussians: Gaussians) -> Tensor:
        return ~self.mask(gaussians)

    def __str__(self) -> str:
        return "not this"


@dataclass(frozen=True, eq=False)
class Grown(Mask):
    """A mask and all within `radius` of it, centre to centre; 0 adds nothing."""

    mask: Mask
    radius: float  # world units

    def __post_init__(self) -> None:
        several([self.mask])
        object.__setattr__(self, "radius", length(self.radius, "grow: radius", least=0.0))

    def __call__(self, gaussians: Gaussians) -> Tensor:
        from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]  (scipy ships no stubs)

        chosen = self.mask(gaussians)
        points = gaussians.means.detach().double().cpu().numpy()
        sound = np.isfinite(points).all(1)
        inside, outside = (np.flatnonzero(sound & part) for part in (chosen.cpu().numpy(), ~chosen.cpu().numpy()))
        if not self.radius or not len(inside) or not len(outside):
            return chosen
        reach = math.nextafter(self.radius, math.inf)  # the tree's bound is strict
        distance, _ = cKDTree(points[inside]).query(points[outside], distance_upper_bound=reach, workers=-1)
        added = torch.from_numpy(outside[distance <= self.radius]).to(chosen.device)
        return chosen.index_fill(0, added, True)

    def __str__(self) -> str:
        return f"this and what lies within {self.radius:g} of it"


KINDS: dict[str, type[Mask]] = {
    "box": Box,
    "sphere": Sphere,
    "rule": Rule,
    "rows": Indices,
    "matching": Matching,
    "relevance": Relevance,
    "all": All,
    "any": Some,
    "not": Not,
    "grown": Grown,
}
NAMES = {kind: name for name, kind in KINDS.items()}


def describe(mask: Mask, gaussians: Gaussians, depth: int = 0) -> list[str]:
    """A line for the mask and each of its parts: what it is and how many of the Gaussians it holds."""
    if isinstance(mask, Matching):
        lost = int((mask.found(gaussians) < 0).sum())
        count, more = len(mask.points) - lost, f"; {lost:,} of its Gaussians are not in the scene" if lost else ""
    else:
        count, more = int(mask(gaussians).sum()), ""
    line = f"{'  ' * depth}{mask}: {count:,} of {gaussians.n:,}{more}"
    return [line, *(below for part in parts(mask) for below in describe(part, gaussians, depth + 1))]


def parts(mask: Mask) -> Iterator[Mask]:
    """The masks that this one is made of."""
    if isinstance(mask, All | Some):
        yield from mask.masks
    elif isinstance(mask, Not | Grown):
        yield mask.mask


# -------------------------------------------------------------------------------- numbers
def numbers(values: Any, count: int | tuple[int, ...], where: str, form: str = "") -> tuple[float, ...]:
    """So many finite numbers, or texts that say them, as a tuple; raises InputError."""
    counts = (count,) if isinstance(count, int) else count
    try:
        given = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        given = ()
    if len(given) not in counts or not all(map(math.isfinite, given)):
        found = (",".join(map(str, values)) or "nothing") if isinstance(values, list | tuple) else repr(values)
        wanted = form or f"{' or '.join(map(str, counts))} number{'s' if counts != (1,) else ''}"
        raise InputError(f"{where}: found {found}, expected {wanted}.")
    return given


def length(value: Any, where: str, least: float | None = None) -> float:
    """A finite length above 0, or from `least` on; raises InputError."""
    (given,) = numbers([value], 1, where)
    if given <= 0 and (least is None or given < least):
        raise InputError(
            f"{where}: found {given:g}, expected a length {'above 0' if least is None else 'of 0 or more'}."
        )
    return given


def several(masks: Any) -> tuple[Mask, ...]:
    """At least one mask; raises InputError for what is none."""
    if not isinstance(masks, list | tuple) or not masks or not all(isinstance(m, Mask) for m in masks):
        raise InputError(f"mask: found {masks!r}, expected masks.")
    return tuple(masks)


def same(a: Any, b: Any) -> bool:
    """Whether two fields of masks hold the same."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return a == b


def frozen(array: np.ndarray) -> np.ndarray:
    """A copy that nobody can write to."""
    array = np.array(array)
    array.setflags(write=False)
    return array


def plain(values: Sequence[float]) -> str:
    return ",".join(f"{v:g}" for v in values)
