"""A table of costs for a device that is not at hand: the larger of arithmetic and memory traffic at its peak figures
(Williams et al., "Roofline", Communications of the ACM 52(4), 2009). No measurement, and marked so wherever it shows.

    device = devices()["h100"]                                    # attnopt/assets/devices.toml, or a file of one's own
    table = Roofline(device, "bfloat16", heads=32, kv_heads=8, head_dim=128, head_dim_v=128, tensor_parallel=4)
    table.cost(1_000_000, sink=4, window=4096)                    # ms of one head's prefill
"""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NoReturn

from attnopt.cost.table import Counted, block_pairs, far_pairs, itemsize, kept_pairs
from attnopt.errors import OptionError
from attnopt.strict_json import Place, nearest

PRESETS = Path(__file__).parents[1] / "assets" / "devices.toml"
AGAIN = "Copy attnopt/assets/devices.toml, which says what each key means, and change the figures."
FIGURES = ("float16", "bfloat16", "float32", "bandwidth", "memory")


@dataclass(frozen=True)
class Device:
    """Peak figures: operations a second of dense matrix products by dtype, bytes a second from memory, bytes of it."""

    key: str
    name: str
    float16: float
    bfloat16: float
    float32: float
    bandwidth: float
    memory: float

    def flops(self, dtype: str) -> float:
        if dtype not in FIGURES[:3]:
            raise OptionError(
                f"There is no peak figure of {self.name} for {dtype}.", "Use float16, bfloat16 or float32."
            )
        return float(getattr(self, dtype))


def devices(path: Path | str | None = None) -> dict[str, Device]:
    """The devices of a file, by default the presets. OptionError names what is wrong in it and where."""
    file = Path(path) if path is not None else PRESETS
    place = Place(str(file), OptionError, AGAIN)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError(f"There is no file of devices {file}.", AGAIN) from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file} cannot be read: {error}.", AGAIN) from error
    except tomllib.TOMLDecodeError as error:
        place.fail(f"not TOML: {error}")
    return {key: _device(place.at(key), key, value) for key, value in data.items()}


def _device(place: Place, key: str, value: object) -> Device:
    read = place.record(value, ("name", *FIGURES))
    figures = {name: place.at(name).number(read[name], float, 0) for name in FIGURES}
    for name, figure in figures.items():
        if not figure > 0:
            place.at(name).fail(f"a figure above 0 is needed, not {figure:g}")
    return Device(key, place.at("name").string(read["name"]), **figures)


def device(key: str, path: Path | str | None = None) -> Device:
    found = devices(path)
    return found[key] if key in found else _unknown(key, found)


def _unknown(key: str, found: dict[str, Device]) -> NoReturn:
    raise OptionError(f"There are no figures of a device {key!r}.", nearest(key, found, "There are"))


@dataclass(frozen=True)
class Roofline(Counted):
    """Milliseconds of one site's heads on `tensor_parallel` devices, among which the heads are shared out; a KV head is
    repeated where there are fewer than devices."""

    device: Device
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    tensor_parallel: int = 1

    kind = "roofline"
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.device.flops(self.dtype)
        if self.tensor_parallel < 1 or self.heads % self.tensor_parallel:
            raise OptionError(
                f"{self.heads} heads cannot be shared out among {self.tensor_parallel} devices.",
                f"Give a --tensor-parallel that divides {self.heads}.",
            )

    @property
    def id(self) -> str:
        digest = hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:8]
        return f"roofline-{self.device.key}-tp{self.tensor_parallel}-{digest}"

    @property
    def key_time(self) -> float:
        """ms that decoding a token spends on reading one cached key and value of one KV head."""
        parts = min(self.tensor_parallel, self.kv_heads)
        return 1e3 * (self.head_dim + self.head_dim_v) * itemsize(self.dtype) / self.device.bandwidth / parts

    def cost(self, length: int, sink: int, window: int) -> float:
        """One head's prefill: two products over the pairs kept; q, k, v and the output once through memory."""
        dims = self.head_dim + self.head_dim_v
        operations = 2.0 * dims * kept_pairs(length, sink, window)
        traffic = dims * length * itemsize(self.dtype) * (1 + self.kv_heads / self.heads)
        return self._bound(operations, traffic)

    def far_cost(self, length: int, kind: str, rank: int) -> float:
        """One head's far part beside its span: the products of `far_pairs`; q, k, v and both outputs once more."""
        dims = self.head_dim + self.head_dim_v
        operations = 2.0 * dims * far_pairs(length, kind, rank)
        traffic = (dims * (1 + self.kv_heads / self.heads) + 2 * self.head_dim_v) * length * itemsize(self.dtype)
        return self._bound(operations, traffic)

    def block_cost(self, length: int, block: int, visited: float, skipped: float) -> float:
        """One head's walk over selected blocks: two products over the pairs visited; q, k, v and the output once."""
        dims = self.head_dim + self.head_dim_v
        traffic = dims * length * itemsize(self.dtype) * (1 + self.kv_heads / self.heads)
        return self._bound(2.0 * dims * block_pairs(length, visited, skipped), traffic)

    def selection_cost(self, length: int, name: str, timed: tuple[float, ...], pairs: int) -> float:
        """One head's selection: as much arithmetic as `pairs` of attention; q and k once through memory."""
        traffic = self.head_dim * length * itemsize(self.dtype) * (1 + self.kv_heads / self.heads)
        return self._bound(2.0 * (self.head_dim + self.head_dim_v) * pairs, traffic)

    def _bound(self, operations: float, traffic: float) -> float:
        """ms of so many operations and so many bytes through memory, whichever take longer, on the devices' heads."""
        seconds = max(operations / self.device.flops(self.dtype), traffic / self.device.bandwidth)
        return 1e3 * seconds / self.tensor_parallel

    def group_cost(self, length: int) -> float:
        """One kernel serves all spans of a layer."""
        return 0.0
