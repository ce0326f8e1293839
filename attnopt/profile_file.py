"""The profile: what was observed of every site at every length, as sums that add. safetensors with a JSON header.

A profile says which model, text, grid and versions it comes from and which statistics it holds. Profiles of several
batches, processes or ranks add (`+`); of another model, grid or set of statistics they refuse to. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.emit import write_atomically
from attnopt.errors import DependencyError, ProfileError
from attnopt.fingerprint import Fingerprint, mismatch
from attnopt.statistics import PROBED, Grid, Observation, sum_names, sum_shapes

SCHEMA = 3
KEY = "attnopt_profile"  # the one metadata key: several would be written in random order
PLAIN = "model labels on text"
MOST_SCALARS = 64
AGAIN = "write it again with `attnopt profile`"


@dataclass(frozen=True)
class Header:
    """Where a profile comes from.

    data: hashes of the text observed, ascending. supervision: what the loss was of, e.g. "model labels on text"; more
    than one where so asked for. dtypes: of q, k, v, e.g. ("bfloat16",). held: the names of the sums.
    versions: (package, version), one entry for every version that took part.
    """

    fingerprint: Fingerprint
    grid: Grid
    data: tuple[str, ...]
    dtypes: tuple[str, ...]
    held: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]
    supervision: tuple[str, ...] = (PLAIN,)
    schema: int = SCHEMA


def versions_here() -> tuple[tuple[str, str], ...]:
    return (("python", platform.python_version()), ("torch", torch.__version__))


@dataclass
class Profile:
    """observations: (site name, length) -> Observation, in the order in which the sites run.

    scalars: length -> mark of a sample -> site -> sum_i t_i, float32 (H, S, W), of at most MOST_SCALARS samples of a
    length: what the products of heads' and layers' effects are made of. Those with the smallest marks stay; marks are
    hashes, so that is a random choice, and the same whatever order profiles are added in.
    """

    header: Header
    observations: dict[tuple[str, int], Observation] = field(default_factory=dict)
    scalars: dict[int, dict[str, dict[str, Tensor]]] = field(default_factory=dict)

    @classmethod
    def empty(
        cls, fingerprint: Fingerprint, grid: Grid, data: Iterable[str], dtypes: Iterable[str], delta: bool = False,
        backward: bool = True, supervision: Iterable[str] = (PLAIN,),
    ) -> Profile:  # fmt: skip
        """A profile to which `observation` adds sites. data: hashes of the text; dtypes: of the sites."""
        marks, types, of = (tuple(sorted(set(names))) for names in (data, dtypes, supervision))
        return cls(Header(fingerprint, grid, marks, types, sum_names(delta, backward), versions_here(), of))

    def observation(self, site: str, heads: int, length: int) -> Observation:
        """The observation of a site (its name) at a length, to be added to; a new one where there is none."""
        found = self.observations.get((site, length))
        if found is None:
            held = self.header.held
            found = Observation.zeros(heads, self.header.grid, length, "delta" in held, "t2" in held)
            self.observations[site, length] = found
        if found.heads != heads:
            raise ProfileError(f"{site} was profiled with {found.heads} heads and has {heads}", AGAIN)
        return found

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted({length for _, length in self.observations}))

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site for site, _ in self.observations))

    @property
    def samples(self) -> dict[int, int]:
        """Samples at each length: sequences times label draws, the most of any site."""
        return {n: max(o.samples for (_, length), o in self.observations.items() if length == n) for n in self.lengths}

    def __iadd__(self, other: Profile) -> Profile:
        self.add(other)
        return self

    def add(self, other: Profile, mixed: bool = False) -> None:
        """Add `other` in place; ProfileError, and nothing changed, if it is of another model, grid or statistics, or,
        unless `mixed`, if its loss was of something else."""
        mine, theirs = self.header, other.header
        different = mismatch(mine.fingerprint, theirs.fingerprint)
        if different:
            raise ProfileError(f"these profiles do not add: {different}", "add profiles of one model only")
        for what in ("grid", "held"):
            one, two = getattr(mine, what), getattr(theirs, what)
            if one != two:
                raise ProfileError(f"these profiles do not add: {what} {one} and {two}", "profile with equal settings")
        if mine.supervision != theirs.supervision and not mixed:
            one, two = (" and ".join(header.supervision) for header in (mine, theirs))
            raise ProfileError(
                f"these profiles do not add: one has {one}, the other {two}",
                "plan from each, or merge them on purpose with `attnopt merge --mixed`",
            )
        for key, theirs_seen in other.observations.items():
            seen = self.observations.get(key)
            if seen is not None and seen.heads != theirs_seen.heads:
                raise ProfileError(
                    f"these profiles do not add: {key[0]} has other heads", "add profiles of one model only"
                )
        self.header = Header(
            mine.fingerprint,
            mine.grid,
            tuple(sorted({*mine.data, *theirs.data})),
            tuple(sorted({*mine.dtypes, *theirs.dtypes})),
            mine.held,
            tuple(sorted({*mine.versions, *theirs.versions})),
            tuple(sorted({*mine.supervision, *theirs.supervision})),
        )
        for (site, length), observation in other.observations.items():
            self.observation(site, observation.heads, length).__iadd__(observation)
        for length, samples in other.scalars.items():
            self.keep_scalars(length, samples)

    def keep_scalars(self, length: int, samples: Mapping[str, dict[str, Tensor]]) -> None:
        """Add samples' scalars, mark -> site -> (H, S, W), as far as there is room for them."""
        both = {**self.scalars.get(length, {}), **samples}
        self.scalars[length] = {mark: both[mark] for mark in sorted(both)[:MOST_SCALARS]}

    def sample_t1(self, length: int) -> dict[str, Tensor]:
        """site -> sum_i t_i of every sample kept at `length`, (samples, H, S, W); samples alike for all sites."""
        kept = self.scalars.get(length, {})
        return {site: torch.stack([kept[mark][site] for mark in kept]) for site in next(iter(kept.values()), {})}

    def __add__(self, other: Profile) -> Profile:
        total = Profile(self.header)
        total += self
        total += other
        return total

    def check_model(self, fingerprint: Fingerprint) -> None:
        """ProfileError unless the profile is of the model with this fingerprint."""
        different = mismatch(self.header.fingerprint, fingerprint)
        if different:
            raise ProfileError(f"this profile belongs to another model: {different}", "profile this model first")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile; a reader sees the old file or the whole new one. ProfileError if a sum is not finite."""
        self.check_finite()
        write_atomically(Path(path), self.to_bytes())

    def check_finite(self) -> None:
        """ProfileError if a sum is not finite."""
        for (site, length), o in self.observations.items():
            if not all(tensor.isfinite().all() for tensor in (*o.sums.values(), *o.probe.values())):
                raise ProfileError(
                    f"What was observed of {site} at length {length} is not finite.",
                    "Check that the model's loss and gradients are finite on this text, or profile with --dtype fp32.",
                )

    def to_bytes(self) -> bytes:
        """The content of the profile's file."""
        save = _safetensors().save
        header = _header_to_json(self.header)
        header["lengths"], header["samples"] = list(self.lengths), {str(n): c for n, c in self.samples.items()}
        header["observations"] = [
            {
                "site": site,
                "length": length,
                "heads": o.heads,
                "rows": o.rows,
                "samples": o.samples,
                "tokens": o.counted,
                "asked": o.asked,
            }
            for (site, length), o in self.observations.items()
        ]
        tensors = {
            f"{n}.{name}": o.sums[name].contiguous()
            for n, o in enumerate(self.observations.values())
            for name in self.header.held
        }
        tensors |= {
            f"{n}.probe.{name}": tensor.contiguous()
            for n, o in enumerate(self.observations.values())
            for name, tensor in o.probe.items()
        }
        header["sampled"] = {str(length): list(samples) for length, samples in self.scalars.items() if samples}
        for n, (site, length) in enumerate(self.observations):
            if self.scalars.get(length):
                tensors[f"{n}.sample_t1"] = self.sample_t1(length)[site].contiguous()
        content: bytes = save(tensors, {KEY: json.dumps(header, sort_keys=True)})
        return content

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile; ProfileError for anything that `save` would not have written."""
        return cls.from_bytes(_read(Path(path)), str(path))

    @classmethod
    def from_bytes(cls, content: bytes, path: str) -> Profile:
        """The profile of a file's content; `path` says in errors where that is from."""
        metadata, tensors = _parse(content, path)
        if KEY not in metadata:
            raise ProfileError(
                f"{path} is a safetensors file and not a profile", "give a file that `attnopt profile` wrote"
            )
        try:
            data = json.loads(metadata[KEY])
            schema = data["schema"]
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"the header of {path} cannot be read", AGAIN) from error
        if schema != SCHEMA:
            raise ProfileError(
                f"{path} has profile format {schema}, this attnopt reads {SCHEMA}",
                f"{AGAIN}, or use the attnopt that wrote it",
            )
        try:
            profile = cls(_header_from_json(data))
            for n, entry in enumerate(data["observations"]):
                _add_entry(profile, n, entry, tensors)
                _add_scalars(profile, n, entry, data.get("sampled", {}), tensors)
            if tensors:
                raise ValueError(f"tensors that the header does not name: {sorted(tensors)[0]}")
            if data["lengths"] != list(profile.lengths) or data["samples"] != {
                str(n): c for n, c in profile.samples.items()
            }:
                raise ValueError("the lengths or numbers of samples differ from those of the observations")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ProfileError(f"{path} contradicts itself: {reason}", AGAIN) from error
        return profile


def merged(profiles: Iterable[tuple[str, Profile]], mixed: bool = False) -> Profile:
    """One profile of all, each given with its file's name: the numbers are those of one run over all their text, to the
    last bits of a sum in another order. ProfileError where text is in two of them, or where they do not add; `mixed`
    also adds those whose losses were of something else."""
    seen: dict[str, str] = {}
    total: Profile | None = None
    for name, profile in profiles:
        twice = next((mark for mark in profile.header.data if mark in seen), None)
        if twice is not None:
            problem = f"{seen[twice]} and {name} observed the same text, which would count twice"
            raise ProfileError(problem, "merge profiles of different text, or of different seeds")
        seen.update(dict.fromkeys(profile.header.data, name))
        try:
            if total is None:
                total = Profile(profile.header)
            total.add(profile, mixed)
        except ProfileError as error:
            raise ProfileError(f"{name}: {error.problem}", error.remedy) from error
    if total is None:
        raise ProfileError("there is nothing to merge", "give one profile or more")
    return total


def _header_to_json(header: Header) -> dict[str, Any]:
    return {
        "schema": header.schema,
        "fingerprint": header.fingerprint.to_json(),
        "grid": {"sinks": list(header.grid.sinks), "windows": list(header.grid.windows)},
        "data": list(header.data),
        "supervision": list(header.supervision),
        "dtypes": list(header.dtypes),
        "held": list(header.held),
        "versions": [list(version) for version in header.versions],
    }


def _header_from_json(data: Mapping[str, Any]) -> Header:
    grid = Grid(*(tuple(_count(x) for x in data["grid"][name]) for name in ("sinks", "windows")))
    held = tuple(data["held"])
    if held not in [sum_names(delta, backward) for delta in (False, True) for backward in (False, True)]:
        raise ValueError(f"statistics that this attnopt does not know: {', '.join(map(str, held))}")
    return Header(
        Fingerprint.from_json(data["fingerprint"]),
        grid,
        tuple(str(x) for x in data["data"]),
        tuple(str(x) for x in data["dtypes"]),
        held,
        tuple((str(package), str(version)) for package, version in data["versions"]),
        tuple(str(x) for x in data["supervision"]),
    )


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _add_entry(profile: Profile, n: int, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Move observation n from `tensors` into the profile; ValueError where header and tensors disagree."""
    site, header = entry["site"], profile.header
    length, heads, rows, samples = (_count(entry[name]) for name in ("length", "heads", "rows", "samples"))
    if not isinstance(site, str) or not length or not heads:
        raise ValueError(f"observation {n} has no site, length or heads")
    if (site, length) in profile.observations:
        raise ValueError(f"{site} at length {length} is there twice")
    tokens = entry["tokens"]
    if tokens is not None and (not isinstance(tokens, float) or not 0 < tokens < float("inf")):
        raise ValueError(f"{tokens!r} is no sum of weights")
    if rows > samples * length:
        raise ValueError(f"{site} counts {rows} rows in {samples} samples of length {length}")
    asked = entry["asked"]
    if not isinstance(asked, float) or not 0 <= asked < float("inf"):
        raise ValueError(f"{asked!r} is no sum of weights")
    shapes = sum_shapes(heads, header.grid, length, header.held)
    if asked:
        all_shapes = sum_shapes(heads, header.grid, length, PROBED)
        shapes |= {f"probe.{name}": shape for name, shape in all_shapes.items()}
    sums = {}
    for name, shape in shapes.items():
        tensor = tensors.pop(f"{n}.{name}", None)
        if tensor is None:
            raise ValueError(f"{name} of {site} at length {length} is missing")
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} of {site} is {found} where the header has torch.float64 {shape}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} of {site} is not finite")
        if name in ("t2", "sample_sq", "delta", "ablation_t2", "probe.t2", "probe.ablation_t2") and (tensor < 0).any():
            raise ValueError(f"{name} of {site} is a sum of squares and negative")
        sums[name] = tensor
    probe = {name: sums.pop(f"probe.{name}") for name in PROBED if asked}
    profile.observations[site, length] = Observation(
        heads, header.grid, length, rows, samples, sums, tokens, probe=probe, asked=asked
    )


def _add_scalars(
    profile: Profile, n: int, entry: Mapping[str, Any], sampled: Mapping[str, list[str]], tensors: dict[str, Tensor]
) -> None:
    """Move the scalars of observation n from `tensors` into the profile; ValueError where the header disagrees."""
    length, marks = entry["length"], sampled.get(str(entry["length"]))
    if marks is None:
        return
    grid, tensor = profile.header.grid, tensors.pop(f"{n}.sample_t1", None)
    shape = (len(marks), entry["heads"], len(grid.sinks), len(grid.windows))
    if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.isfinite().all():
        raise ValueError(f"sample_t1 of {entry['site']} at length {length} is not {shape} finite float32 numbers")
    if marks != sorted(set(marks)) or not set(marks) <= set(profile.header.data):
        raise ValueError(f"the samples of length {length} are not among the text observed")
    kept = profile.scalars.setdefault(length, {mark: {} for mark in marks})
    for mark, scalars in zip(marks, tensor, strict=True):
        kept[mark][entry["site"]] = scalars


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise DependencyError("profiles are safetensors files", "pip install safetensors") from error
    return safetensors.torch


def _read(path: Path) -> bytes:
    if not path.is_file():
        problem = f"{path} is a folder" if path.is_dir() else f"there is no profile {path}"
        raise ProfileError(problem, "make one with `attnopt profile`, or correct the path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProfileError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error


def _parse(content: bytes, path: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; the tensors are copied, nothing is mapped."""
    torch_format = _safetensors()
    try:  # 8 bytes of length, so many bytes of JSON, then the tensors; `load` checks lengths and offsets
        tensors = torch_format.load(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except Exception as error:  # safetensors raises its own SafetensorError, and others for unknown dtypes
        raise ProfileError(f"{path} is truncated or not a safetensors file", AGAIN) from error
    return metadata, tensors
