"""The source side of an edit, remembered: what depends on camera and noise level alone is evaluated once.

A guidance that compares the edit with its source needs, of the source, a noise level, a noise (refined or not) and the
guided score there. None of it changes while the scene is edited. `SourceCache` keeps such records for each camera and
each of a few strata of noise levels, so that a step evaluates the edited latents only. A record is a pure function of
its key, so that forgetting it, or finding it on disk, never changes an edit.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from splatedit import __version__
from splatedit.diffusion import Denoise, Draw, Text, scales, step_range, with_noise
from splatedit.errors import InputError
from splatedit.files import atomic, made
from splatedit.fpr import fpr, rows_per_sample

if TYPE_CHECKING:
    from splatedit.priors import Prior

SERVED = ("ids", "dds", "pds", "dreamcatalyst")  # guidances whose source side is a noise and the score there
SAMPLES = 64  # numbers of each parameter that go into the fingerprint of a network


class Record(NamedTuple):
    """One draw for one camera and what the prior says of the source there; one row each, on the CPU."""

    t: Tensor  # (1,) int64
    noise: Tensor  # (1, c, h, w) refined, or as drawn
    score: Tensor  # (1, c, h, w) guided ehat of the source latents with this noise under the source text

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self)


class Filled(NamedTuple):
    """What filling one record gave and took."""

    noise: Tensor  # (1, c, h, w)
    score: Tensor
    evaluations: int  # network rows
    backwards: int  # of them, rows sent back


Fill = Callable[[Tensor, Draw], Filled]  # source latents (1, c, h, w) and a draw for them


def source_side(denoise: Denoise, source: Text, iters: int = 0, **options: Any) -> Fill:
    """The function that fills records: the noise of the draw, refined as `fpr.fpr` with these options would, and the
    guided score of the source there. No iterations serve every guidance but `ids`.
    """

    def fill(z: Tensor, draw: Draw) -> Filled:
        found = fpr(denoise, z, draw, source, iters, **options)
        if found.score is not None:
            return Filled(found.noise, found.score, found.evaluations, found.backwards)
        with torch.no_grad():
            score = denoise(draw._replace(noise=found.noise).noised(z), draw.t, source)
        return Filled(found.noise, score, found.evaluations + rows_per_sample(denoise), found.backwards)

    return fill


class SourceCache:
    """Records of n source views, made when first asked for; the least recently used leave when memory is full.

    fill: see `source_side`. z_source: (n, c, h, w). t_range: fractions of the schedule, cut into `strata` equal parts
    with one record per view each. refresh: after so many uses a record gives way to another draw of its stratum; 0 is
    never. megabytes: of records in memory. folder: also keep them there, and look there first; edits that agree in
    `key`, latents and schedule share them. key: whatever else a record depends on (see `digest`); it holds the seed.
    Raises InputError for a value out of range or a folder that cannot be written.
    """

    def __init__(
        self,
        fill: Fill,
        z_source: Tensor,
        alphas_cumprod: Tensor,
        t_range: tuple[float, float],
        key: str,
        *,
        strata: int = 2,
        refresh: int = 0,
        megabytes: float = 256.0,
        folder: str | Path | None = None,
    ):
        for name, value, least in (("strata", strata, 1), ("refresh", refresh, 0), ("megabytes", megabytes, 0)):
            if not value >= least:
                raise InputError(f"source cache {name}: found {value}, expected {least} or more.")
        self.fill, self.z, self.alphas_cumprod = fill, z_source, alphas_cumprod
        self.low, self.high = step_range(alphas_cumprod, t_range)
        self.strata, self.refresh, self.room = min(strata, self.high - self.low + 1), refresh, megabytes * 2**20
        self.folder = None if folder is None else made(Path(folder), "cache_dir")
        self.names = [digest(key, row, alphas_cumprod) for row in z_source]
        self.records: OrderedDict[str, Record] = OrderedDict()
        self.bytes = 0
        self.visits: Counter[tuple[int, int]] = Counter()  # by view and stratum; decides which draw is served
        self.counts = Counter(hits=0, filled=0, read=0, dropped=0)
        self.evaluations = self.backwards = 0  # network rows that filling took

    def __call__(self, views: Sequence[int], t: Tensor) -> tuple[Draw, Tensor]:
        """A draw for these views near the steps t (b,), and the source's guided score there (b, c, h, w).

        The draw's own steps lie in the same strata as t.
        """
        records = [self.record(view, self.stratum(int(step))) for view, step in zip(views, t, strict=True)]
        step, noise, score = (torch.cat(column).to(self.z.device) for column in zip(*records, strict=True))
        return Draw(step, *scales(self.alphas_cumprod, step, noise), noise), score

    def stratum(self, step: int) -> int:
        """Which part of the range a step falls into."""
        step = min(max(step, self.low), self.high)
        return (step - self.low) * self.strata // (self.high - self.low + 1)

    def record(self, view: int, stratum: int) -> Record:
        """The record that serves this visit: from memory, from disk, or filled now."""
        version = self.visits[view, stratum] // self.refresh if self.refresh else 0
        self.visits[view, stratum] += 1
        name = digest(self.names[view], self.low, self.high, self.strata, stratum, version)
        if name in self.records:
            self.counts["hits"] += 1
            self.records.move_to_end(name)
            return self.records[name]
        record = self.read(name)
        if record is None:
            record = self.make(name, view, stratum)
            self.write(name, record)
        self.keep(name, record)
        return record

    def make(self, name: str, view: int, stratum: int) -> Record:
        """Draw step and noise from the name alone, and ask the prior. One view at a time, whatever the step's batch."""
        generator = torch.Generator().manual_seed(int(name[:15], 16))
        count = self.high - self.low + 1
        first, end = (self.low - (-part * count // self.strata) for part in (stratum, stratum + 1))
        t = torch.randint(first, end, (1,), generator=generator)
        z = self.z[view : view + 1]
        filled = self.fill(z, with_noise(self.alphas_cumprod, t, z, generator))
        self.counts["filled"] += 1
        self.evaluations += filled.evaluations
        self.backwards += filled.backwards
        return Record(t, filled.noise.detach().cpu(), filled.score.detach().cpu())

    def keep(self, name: str, record: Record) -> None:
        """Put a record into memory and let the least recently used go until all fit."""
        self.records[name] = record
        self.bytes += record.bytes
        while self.bytes > self.room:
            _, gone = self.records.popitem(last=False)
            self.bytes -= gone.bytes
            self.counts["dropped"] += 1

    def read(self, name: str) -> Record | None:
        """The record on disk; None if there is none, or a broken one, which is then made anew."""
        if self.folder is None:
            return None
        try:
            record = Record(**torch.load(self.folder / f"{name}.pt", map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, TypeError, ValueError, EOFError, pickle.UnpicklingError):
            return None
        shape = self.z[:1].shape
        if record.t.shape != (1,) or record.noise.shape != shape or record.score.shape != shape:
            return None
        self.counts["read"] += 1
        return record

    def write(self, name: str, record: Record) -> None:
        if self.folder is not None:
            with atomic(self.folder / f"{name}.pt") as stream:
                torch.save(record._asdict(), stream)


def digest(*parts: Any) -> str:
    """One short name (40 hexadecimal digits) of tensors, texts and plain values, the same in every process."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Text):
            part = digest(*part)
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            sha.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            sha.update(part.flatten().view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(part).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:40]


def fingerprint(prior: Prior) -> str:
    """What tells one prior from another: its schedule, and a few numbers out of every parameter of its network.

    A LoRA that is added or fused, other weights and another precision all change it; reading them all would take
    seconds for a full model.
    """
    parts: list[Any] = [__version__, prior.name, getattr(prior, "prediction_type", None), prior.alphas_cumprod]
    network = getattr(prior, "unet", None)
    for name, value in network.state_dict().items() if network is not None else ():
        flat = value.detach().flatten()
        parts += [name, flat[:: max(1, flat.numel() // SAMPLES)]]
    return digest(*parts)
