"""Which model a plan or a profile belongs to; casting, moving and compiling the model make no difference."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnopt.errors import ModelError, ProfileError
from attnopt.ir import Site

SAMPLES = 16  # weights looked at, and of each so many entries:
ENTRIES = 8  # few, so that training on moves their mean; a cast to bfloat16 moves it by 0.4 % at most
TOLERANCE = 0.02
# Configuration that says how a model is run or where it came from, not what it computes.
VOLATILE = frozenset(
    {
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "_experts_implementation_internal",
        "experts_implementation",
        "transformers_version",
        "_commit_hash",
        "_name_or_path",
        "name_or_path",
        "_output_attentions",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_return_dict",
    }
)


@dataclass(frozen=True)
class Fingerprint:
    """structure: hash of class, configuration and ordered sites; samples: sampled weights' mean sizes, 4 digits.

    Neither depends on dtype, device or torch.compile. Compare with `mismatch`, not with ==: a cast moves the samples.
    """

    structure: str
    samples: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {"structure": self.structure, "samples": list(self.samples)}

    @classmethod
    def from_json(cls, data: Any) -> Fingerprint:
        try:
            structure, samples = data["structure"], tuple(float(x) for x in data["samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError("the model fingerprint in this file cannot be read", "write the file again") from error
        if not isinstance(structure, str) or set(data) != {"structure", "samples"}:
            raise ProfileError("the model fingerprint in this file is not of a known form", "write the file again")
        return cls(structure, samples)

    def __str__(self) -> str:
        return self.structure


def _settled(value: Any) -> Any:
    """Configuration as plain data that prints the same in every process: no volatile keys, no addresses."""
    if isinstance(value, Mapping):
        return {str(key): _settled(item) for key, item in sorted(value.items(), key=str) if key not in VOLATILE}
    if isinstance(value, (list, tuple)):
        return [_settled(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _settled(vars(value))
    return type(value).__name__


def _configuration(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    if callable(to_dict):
        return _settled(to_dict())
    if config is not None and not isinstance(config, Mapping) and hasattr(config, "__dict__"):
        return _settled(vars(config))
    return _settled(config)


def _plain(name: str) -> str:
    """A module or parameter path without the wrappers of torch.compile and of data parallelism."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))


def _structure(model: nn.Module, sites: Sequence[Site]) -> str:
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    lines = [type(model).__name__, json.dumps(_configuration(model), sort_keys=True)]
    lines += [f"{_plain(s.name)} {s.heads}/{s.kv_heads} {s.head_dim}/{s.head_dim_v}" for s in sites]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _samples(model: nn.Module) -> tuple[float, ...]:
    """Mean size of a few evenly spaced entries of evenly spaced parameters, in the order of their names."""
    named = sorted((_plain(name), p.detach()) for name, p in model.named_parameters() if p.is_floating_point())
    # Norms and biases start at 1 or 0 in every model: they tell models apart only where there is nothing else.
    named = [(name, p) for name, p in named if p.dim() > 1 and p.numel()] or [(n, p) for n, p in named if p.numel()]
    count, samples = min(SAMPLES, len(named)), []
    for n in range(count):
        name, weight = named[n * len(named) // count]
        if weight.is_meta:
            raise ModelError(f"the weights of {name} are not loaded", "load the model before profiling or planning")
        entries = torch.arange(min(ENTRIES, weight.numel())) * weight.numel() // min(ENTRIES, weight.numel())
        mean = weight.reshape(-1)[entries.to(weight.device)].float().abs().mean()
        samples.append(float(f"{float(mean):.4g}"))
    return tuple(samples)


def fingerprint_of(model: nn.Module, sites: Sequence[Site]) -> Fingerprint:
    """The fingerprint of `model` with the attentions `sites`, in the order in which they run."""
    return Fingerprint(_structure(model, sites), _samples(model))


def mismatch(a: Fingerprint, b: Fingerprint) -> str:
    """What tells two models apart, as a sentence without its full stop; "" if nothing does."""
    if a.structure != b.structure:
        return f"the models differ in class, configuration or attentions ({a.structure} and {b.structure})"
    if len(a.samples) != len(b.samples):
        return f"the models differ in their parameters ({len(a.samples)} and {len(b.samples)} were sampled)"
    for n, (x, y) in enumerate(zip(a.samples, b.samples, strict=True)):
        if not abs(x - y) <= TOLERANCE * max(abs(x), abs(y)) + 1e-7:  # 1e-7: the spacing of float16 near 0
            return f"the models have the same structure and different weights (sample {n}: {x:g} and {y:g})"
    return ""


def digest(model: nn.Module) -> str:
    """A hash of every parameter and buffer, 16 hexadecimal digits: where a fingerprint's samples are not enough,
    because nothing measured of other weights may be taken for these. About 1 s a gigabyte on one CPU core."""
    found = hashlib.sha256()
    for name, held in (*model.named_parameters(), *model.named_buffers()):
        plain = held.detach().to("cpu").contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
