"""Several processes that profile one model together, as torchrun starts them: each takes a part of the text, and the
sums are gathered over torch.distributed. Nothing but plain bytes goes between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnopt.errors import ProfileError
from attnopt.profile_file import Profile, merged


def started() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and dist.is_available()


def join() -> None:
    """Meet the other processes, once; without any, nothing happens. Over gloo: what is gathered is small."""
    if started() and not dist.is_initialized():
        dist.init_process_group("gloo")


def leave() -> None:
    """Part from the other processes, all at once: one that ends while another still talks to it may be aborted."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def device_of(name: str) -> str:
    """The device of this process: "cuda" is a GPU of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" and started() else name


def gathered(content: bytes) -> list[bytes]:
    """What every process gives, in the order of ranks, to all of them."""
    if size() == 1:
        return [content]
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    own = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(content)], device=device))
    most = max(int(n) for n in lengths)
    # Of one length, as the collective wants it.
    padded = torch.zeros(max(most, 1), dtype=torch.uint8, device=device)
    padded[: own.numel()] = own
    parts: list[Tensor] = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(parts, padded)
    return [bytes(p[: int(n)].cpu().numpy()) for p, n in zip(parts, lengths, strict=True)]


def gathered_json(data: Any) -> list[Any]:
    return [json.loads(content) for content in gathered(json.dumps(data).encode())]


def together(work: Callable[[], Profile]) -> Profile:
    """The sum of what `work` returns in every process, to all of them. A mistake in one of them is raised in all: none
    is left waiting for the others."""
    if size() == 1:
        return work()
    problem: list[str] = []
    content = b""
    try:
        content = work().to_bytes()
    except ProfileError as error:
        problem = [error.problem, error.remedy]
    for n, found in enumerate(gathered_json(problem)):
        if found:
            raise ProfileError(f"Process {n}: {found[0]}", found[1])
    return merged(
        (f"process {n}", Profile.from_bytes(part, f"process {n}")) for n, part in enumerate(gathered(content))
    )


def partial_of(partial: Path) -> Path:
    """Where this process keeps what it has done so far."""
    return partial.with_name(f"{partial.name}.{rank()}") if rank() else partial


def leftovers(partial: Path) -> list[Path]:
    """The files left by an earlier run, of however many processes."""
    numbered = sorted(p for p in partial.parent.glob(f"{partial.name}.*") if p.suffix[1:].isdigit())
    return [p for p in (partial, *numbered) if p.exists()]
