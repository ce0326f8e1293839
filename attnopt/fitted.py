"""What was fitted offline for a model's heads: feature maps and mean outputs, and what they do to the loss.

safetensors with a JSON header, beside a profile or, cut down to what it needs, beside a plan.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.emit import write_atomically
from attnopt.errors import FittedError
from attnopt.feature_maps import NAMES, FeatureMap
from attnopt.fingerprint import Fingerprint, mismatch
from attnopt.ir import WHOLE, Choice, Share
from attnopt.profile_file import versions_here
from attnopt.registry import CANDIDATES
from attnopt.statistics.trials import HELD, Trials

SCHEMA = 2
KEY = "attnopt_fitted"  # the one metadata key: several would be written in random order
AGAIN = "write it again with `attnopt distill`"
# Of trials, what is counted once for all heads and choices.
COUNTED = ("tokens", "rows", "asked")
# A threshold is offered to a head where what it skips holds no more than this share of the mass of its rows. What is
# skipped is decided by a head's scores anew on every text, and a bound of nats does not see what no row of the text
# tried needed; a head that gives up more than a twentieth of its mass does not skip what is negligible.
MOST_SKIPPED = 0.05


def families() -> tuple[str, ...]:
    """Every family of candidates there is, as `attnopt plan --allow` calls them."""
    return tuple(dict.fromkeys(kind.family for _, kind in CANDIDATES if kind.family))


@dataclass(frozen=True)
class Header:
    """Where fits come from. data: hashes of the text that was fitted and tried on, ascending; lengths: those of the
    trials; settings: what was asked for, in one line; versions: (package, version)."""

    fingerprint: Fingerprint
    data: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    seed: int = 0
    settings: str = ""
    versions: tuple[tuple[str, str], ...] = field(default_factory=versions_here)
    schema: int = SCHEMA

    @property
    def calibration(self) -> str:
        """One hash of all text, as a plan names it."""
        return hashlib.sha256(" ".join(self.data).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class HeadFit:
    """How one head's map was found. method: "random", "centroids", "learned" or "expansion"; error: of the head's
    output on held-out rows, squared, relative to that of dropping the far keys; refused: why the map is not used."""

    method: str
    error: float
    refused: str = ""


@dataclass
class Fitted:
    """maps: (site, map name) -> the maps of the heads in `held`, ascending, all of them unless `part_of` cut it down.
    Map names are "linear/64" (features) and "taylor/8" (rank). means: site -> mean outputs (H, Dv) float32. trials:
    (site, length) -> what choices did to the loss there. fits: as `maps`, one HeadFit for every head held."""

    header: Header
    maps: dict[tuple[str, str], FeatureMap] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    trials: dict[tuple[str, int], Trials] = field(default_factory=dict)
    fits: dict[tuple[str, str], tuple[HeadFit, ...]] = field(default_factory=dict)
    held: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)

    def add_map(
        self, site: str, name: str, found: FeatureMap, fits: Sequence[HeadFit], heads: Sequence[int] | None = None
    ) -> None:
        """The maps of a site's heads; of all of them by default."""
        self.maps[site, name], self.fits[site, name] = found, tuple(fits)
        self.held[site, name] = tuple(range(found.heads) if heads is None else heads)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*(site for site, _ in self.maps), *self.means, *(site for site, _ in self.trials)]))

    def map_of(self, site: str, name: str, heads: Sequence[int]) -> FeatureMap:
        """The maps of some heads of a site, in the order given; FittedError where one is missing."""
        held = self.held.get((site, name), ())
        missing = [head for head in heads if head not in held]
        if missing:
            raise FittedError(
                f"There is no feature map {name} of head {missing[0]} of {site}.",
                "Fit it with `attnopt distill`, or choose another replacement.",
            )
        return self.maps[site, name].of([held.index(head) for head in heads])

    def mean_of(self, site: str, heads: Sequence[int]) -> Tensor:
        """Mean outputs (h, Dv) of some heads of a site; FittedError where there are none."""
        if site not in self.means:
            raise FittedError(
                f"There are no mean outputs of the heads of {site}.",
                "Measure them with `attnopt distill`, or choose another replacement.",
            )
        return self.means[site][list(heads)]

    def choices(self, site: str) -> tuple[Choice, ...]:
        """What was tried at every length at which the site was."""
        tried = [trials.choices for (name, _), trials in self.trials.items() if name == site]
        return tuple(c for c in tried[0] if all(c in others for others in tried)) if tried else ()

    def damage(self, site: str, length: int, choice: Choice) -> Tensor:
        """Nats per token of every head under `choice`, float64 (H,); FittedError where that was not tried."""
        return self._tried(site, length, choice).damage(choice)

    def forgotten(self, site: str, length: int, choice: Choice) -> Tensor | None:
        """Nats per token of a retrieval probe's answers, float64 (H,), or None where none was tried; FittedError as
        `damage`."""
        return self._tried(site, length, choice).forgotten(choice)

    def shares(self, site: str, length: int, choice: Choice) -> tuple[Share, ...]:
        """What every head visited and kept where `choice` selects keys; FittedError as `damage`."""
        return self._tried(site, length, choice).shares(choice)

    def _tried(self, site: str, length: int, choice: Choice) -> Trials:
        trials = self.trials.get((site, length))
        if trials is None or choice not in trials.choices:
            lengths = ", ".join(str(n) for n in self.header.lengths) or "none"
            raise FittedError(
                f"{choice} was not tried at {site} with {length} tokens; tried are the lengths {lengths}.",
                "Fit again with `attnopt distill` and the profile that you plan from.",
            )
        return trials

    def skips(self, site: str, choice: Choice) -> tuple[Tensor, Tensor] | None:
        """Of a choice with a threshold, for every head, float64 (H,): the largest share of visited blocks that it skips
        at any length, and the largest share of mass that is lost by that. None of any other choice."""
        params = dict(choice.params)
        if not params.get("skip"):
            return None
        without = Choice.of(choice.candidate, {**params, "skip": 0.0})
        found = [trials for (name, _), trials in self.trials.items() if name == site and choice in trials.choices]
        skipped, lost = [], []
        for trials in found:
            shares = trials.shares(choice)
            before = trials.shares(without) if without in trials.choices else (WHOLE,) * len(shares)
            skipped.append([own.skipped for own in shares])
            lost.append([whole.recalled - own.recalled for own, whole in zip(shares, before, strict=True)])
        return tuple(torch.tensor(x, dtype=torch.float64).amax(0) for x in (skipped, lost))  # type: ignore[return-value]

    def offered(self, site: str, choice: Choice) -> Tensor:
        """bool (H,): the heads to which `choice` may be offered. One with a part for far keys must be better than its
        own plain window at some length, worse at none, and its map must not be refused. One with a threshold must skip
        something at some length, and MOST_SKIPPED of the mass at most at any."""
        found = [trials for (name, _), trials in self.trials.items() if name == site and choice in trials.choices]
        if not found:
            return torch.zeros(self._heads_of(site), dtype=torch.bool)
        damages = torch.stack([trials.damage(choice) for trials in found])
        allowed = damages.isfinite().all(0)
        plain = plain_window(choice)
        if plain is not None:
            if any(plain not in trials.choices for trials in found):
                return torch.zeros_like(allowed)
            windows = torch.stack([trials.damage(plain) for trials in found])
            allowed &= (damages <= windows).all(0) & (damages < windows).any(0)
        skips = self.skips(site, choice)
        if skips is not None:
            allowed &= (skips[0] > 0) & (skips[1] <= MOST_SKIPPED)
        name = CANDIDATES[choice.candidate].map_name(dict(choice.params))
        if name:
            fits, held = self.fits.get((site, name), ()), self.held.get((site, name), ())
            usable = {head for head, fit in zip(held, fits, strict=True) if not fit.refused}
            allowed &= torch.tensor([head in usable for head in range(len(allowed))], dtype=torch.bool)
        return allowed

    def _heads_of(self, site: str) -> int:
        return next((t.heads for (name, _), t in self.trials.items() if name == site), len(self.means.get(site, ())))

    def part_of(self, choices: Mapping[str, Sequence[Choice]]) -> Fitted:
        """What a plan needs: the maps of the heads that use them, the means of sites with heads that are gone; no
        trials. FittedError where something is missing."""
        part = Fitted(replace(self.header))
        for site, of_site in choices.items():
            users: dict[str, list[int]] = {}
            for head, choice in enumerate(of_site):
                kind = CANDIDATES[choice.candidate]
                name = kind.map_name(dict(choice.params))
                if name:
                    users.setdefault(name, []).append(head)
                if kind.far == "gone" and site not in part.means:
                    self.mean_of(site, [head])
                    part.means[site] = self.means[site]
            for name in sorted(users):
                at = [self.held[site, name].index(h) for h in users[name]] if (site, name) in self.maps else []
                found = self.map_of(site, name, users[name])
                part.add_map(site, name, found, [self.fits[site, name][n] for n in at], users[name])
        return part

    def check_model(self, fingerprint: Fingerprint) -> None:
        """FittedError unless the fits are of the model with this fingerprint."""
        different = mismatch(self.header.fingerprint, fingerprint)
        if different:
            raise FittedError(f"These fits belong to another model: {different}.", "Fit this model's heads first.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; a reader sees the old one or the whole new one."""
        write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file; FittedError where a number is not finite or a shape is wrong."""
        from safetensors.torch import save

        self._check()
        tensors: dict[str, Tensor] = {}
        for n, found in enumerate(self.maps.values()):
            tensors |= {f"map.{n}.{name}": getattr(found, name) for name in NAMES}
        tensors |= {f"mean.{n}": mean for n, mean in enumerate(self.means.values())}
        for n, trials in enumerate(self.trials.values()):
            tensors |= {f"trial.{n}.{name}": getattr(trials, name) for name in HELD}
        content: bytes = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            {KEY: json.dumps(self._json(), sort_keys=True, allow_nan=False)},
        )
        return content

    def _json(self) -> dict[str, Any]:
        header = self.header
        return {
            "schema": header.schema,
            "fingerprint": header.fingerprint.to_json(),
            "data": list(header.data),
            "lengths": list(header.lengths),
            "seed": header.seed,
            "settings": header.settings,
            "versions": [list(version) for version in header.versions],
            "maps": [
                {
                    "site": site, "name": name, "kind": found.kind, "heads": list(self.held[site, name]),
                    "fits": [[fit.method, fit.error, fit.refused] for fit in self.fits[site, name]],
                }
                for (site, name), found in self.maps.items()
            ],
            "means": list(self.means),
            "trials": [
                {
                    "site": site, "length": length,
                    **{name: getattr(trials, name) for name in COUNTED},
                    "choices": [{"candidate": c.candidate, **dict(c.params)} for c in trials.choices],
                }
                for (site, length), trials in self.trials.items()
            ],
        }  # fmt: skip

    def _check(self) -> None:
        """FittedError for maps, means and trials that must not be used."""
        for (site, name), found in self.maps.items():
            problem = found.problem()
            held, fits = self.held.get((site, name), ()), self.fits.get((site, name), ())
            if not problem and not len(held) == len(fits) == found.heads:
                problem = f"it is of {found.heads} heads and says so of {len(held)} and {len(fits)}"
            if not problem and list(held) != sorted(set(held)):
                problem = f"its heads are {list(held)}, expected ascending ones"
            if problem:
                raise FittedError(f"The feature map {name} of {site} cannot be used: {problem}.", AGAIN)
        for site, mean in self.means.items():
            if mean.ndim != 2 or mean.dtype != torch.float32 or not bool(mean.isfinite().all()):
                raise FittedError(f"The mean outputs of {site} are no finite float32 (heads, features).", AGAIN)
        for (site, length), trials in self.trials.items():
            shape = (trials.heads, len(trials.choices))
            for name in HELD:
                held = getattr(trials, name)
                wrong = tuple(held.shape) != shape or held.dtype != torch.float64 or not bool(held.isfinite().all())
                if wrong or (name != "t1" and bool((held < 0).any())):
                    raise FittedError(
                        f"{name} of the trials of {site} at {length} tokens is no {shape} of finite sums."
                    )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fitted:
        """Read a file of fits; FittedError for anything that `save` would not have written."""
        file = Path(path)
        if not file.is_file():
            problem = f"{file} is a folder" if file.is_dir() else f"There is no file of fits {file}"
            raise FittedError(f"{problem}.", "Make one with `attnopt distill`, or correct the path.")
        try:
            content = file.read_bytes()
        except OSError as error:
            raise FittedError(f"{file} cannot be read: {error.strerror}.", "Check its permissions.") from error
        return cls.from_bytes(content, str(path))

    @classmethod
    def from_bytes(cls, content: bytes, path: str) -> Fitted:
        """The fits of a file's content; `path` says in errors where that is from."""
        from safetensors.torch import load

        try:
            tensors = load(content)
            size = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
        except Exception as error:  # safetensors raises its own SafetensorError, and others for unknown dtypes
            raise FittedError(f"{path} is truncated or not a safetensors file.", AGAIN) from error
        if KEY not in metadata:
            raise FittedError(
                f"{path} is a safetensors file and holds no fits.", "Give a file that `attnopt distill` wrote."
            )
        try:
            data = json.loads(metadata[KEY])
            schema = data["schema"]
        except (KeyError, TypeError, ValueError) as error:
            raise FittedError(f"The header of {path} cannot be read.", AGAIN) from error
        if schema != SCHEMA:
            raise FittedError(f"{path} has the format of fits {schema}, this attnopt reads {SCHEMA}.", AGAIN)
        try:
            fitted = _from_json(data, tensors)
            if tensors:
                raise ValueError(f"tensors that the header does not name: {sorted(tensors)[0]}")
            fitted._check()
        except FittedError as error:
            raise FittedError(f"{path}: {error.problem}", error.remedy or AGAIN) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise FittedError(f"{path} contradicts itself: {reason}.", AGAIN) from error
        return fitted


def plain_window(choice: Choice) -> Choice | None:
    """The plain window whose keys a choice with a part for far keys keeps; None for any other choice."""
    kind = CANDIDATES[choice.candidate]
    if kind.far not in ("mean", "linear"):
        return None
    sink, alpha, beta = kind.rule(dict(choice.params))
    return Choice.of("sink_window", {"sink": sink, "alpha": alpha, "beta": beta})


def _from_json(data: Mapping[str, Any], tensors: dict[str, Tensor]) -> Fitted:
    """Moves what the header names out of `tensors`; ValueError and its like where header and tensors disagree."""
    fitted = Fitted(
        Header(
            Fingerprint.from_json(data["fingerprint"]),
            tuple(str(x) for x in data["data"]),
            tuple(_whole(n, 1) for n in data["lengths"]),
            _whole(data["seed"], None),
            str(data["settings"]),
            tuple((str(package), str(version)) for package, version in data["versions"]),
        )
    )
    for n, entry in enumerate(data["maps"]):
        found = FeatureMap(str(entry["kind"]), *(tensors.pop(f"map.{n}.{name}") for name in NAMES))
        fits = [HeadFit(str(method), float(error), str(refused)) for method, error, refused in entry["fits"]]
        if (entry["site"], entry["name"]) in fitted.maps:
            raise ValueError(f"the map {entry['name']} of {entry['site']} is there twice")
        heads = [_whole(h, 0) for h in entry["heads"]]
        fitted.add_map(str(entry["site"]), str(entry["name"]), found, fits, heads)
    fitted.means = {str(site): tensors.pop(f"mean.{n}") for n, site in enumerate(data["means"])}
    for n, entry in enumerate(data["trials"]):
        choices = tuple(_choice(record) for record in entry["choices"])
        if len(set(choices)) != len(choices) or (entry["site"], entry["length"]) in fitted.trials:
            raise ValueError(f"trials of {entry['site']} are there twice")
        tokens, rows, asked = (_amount(entry[name]) for name in COUNTED)
        if not max(tokens, asked):
            raise ValueError("nothing was tried")
        sums = {name: tensors.pop(f"trial.{n}.{name}") for name in HELD}
        trials = Trials(choices, **sums, tokens=tokens, rows=rows, asked=asked)
        fitted.trials[str(entry["site"]), _whole(entry["length"], 1)] = trials
    return fitted


def _choice(record: Mapping[str, Any]) -> Choice:
    kind = CANDIDATES[record["candidate"]]
    params = {name: value for name, value in record.items() if name != "candidate"}
    problem = kind.problem(params)
    if problem or set(params) != {p.name for p in kind.params}:
        raise ValueError(f"{record} is no choice of this attnopt" + (f": {problem}" if problem else ""))
    return Choice.of(kind.name, {p.name: p.kind(params[p.name]) for p in kind.params})


def _amount(value: Any) -> float:
    if not isinstance(value, float) or not 0 <= value < float("inf"):
        raise ValueError(f"{value!r} is no amount of tokens or rows")
    return value


def _whole(value: Any, least: int | None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        raise ValueError(f"{value!r} is not a whole number" + (f" of at least {least}" if least else ""))
    return value
