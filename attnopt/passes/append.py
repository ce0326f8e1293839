"""Keys and values that grow by a token a call: write the token behind the old ones instead of copying them all.

    out = cat([past, new], 2); sdpa(q, out, ...); return out      past: (B, heads, n, D), an input
    ->
    out = slice_scatter(full, new, 2, n); sdpa(q, out, ...); copy_(full, out)      full: (B, heads, n + T, D), the input

The input becomes a longer one, whose first n positions are the old ones and whose memory lies in a buffer with room
behind it; the output goes, since it is that input. ``backend/append.py`` makes the longer tensor of the past that it is
given and returns it. inductor makes one write of `new` into its place out of the two operations.

The strides of `full` are part of what is compiled. Where the past of the call being compiled has room behind each head,
they are its own; where it is packed, those of a new buffer of `capacity` slots, into which every call copies: the first
token after a prompt, or a cache whose rows are reordered between calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnopt.ir import Refusal, Region, Rewrite
from attnopt.passes.program import Builder, Program, relax_views
from attnopt.patterns import argument
from attnopt.reasons import located

aten = torch.ops.aten
LOWERING = "keys and values appended in place"


@dataclass(frozen=True)
class Append:
    """One tensor that grows: the positions of its past among the graph's inputs and of the result among its outputs.

    added: the positions a call adds; where `added_at` is not None, as many as the input at that position says.
    roomy: whether the longer tensor has the past's strides; else every call copies the past to a buffer of `capacity`.
    like: the longer tensor, without data, that the graph is compiled for.
    """

    past: int
    outputs: tuple[int, ...]
    added: int
    added_at: int | None
    roomy: bool
    like: torch.Tensor


def capacity(length: Any) -> Any:
    """Slots of a new buffer for `length` positions: room for a seventh more and at least 256, in sixteens."""
    # To copy n tokens takes as long as to attend to 3 n (float32, 16384 tokens, 8 heads of 64; exact_append): once
    # every n / 7 steps it costs each what 21 tokens more would. Twice the room would save ten of them.
    return 16 * (length // 14 + 17)


def strides_of(sizes: Any, slots: Any) -> tuple[Any, ...]:
    """Strides of a tensor (B, heads, n, D) in a packed buffer (B, heads, slots, D)."""
    _, heads, _, dim = sizes
    return heads * slots * dim, slots * dim, dim, 1


def run(program: Program) -> None:
    """Nothing changes where nobody gives inputs their room."""
    for region in program.regions if program.room else ():
        if region.site.kv != "cat":
            continue
        # One where keys are values.
        writers = list(dict.fromkeys(region.kv_nodes[f"{side}_writer"] for side in "kv"))
        if not any(kept(program, writer) for writer in writers) or not program.affords(region):
            continue
        found = [obstacle(program, writer) for writer in writers]
        no = next((no for no in found if no is not None), None)
        if no is None:
            for writer in writers:
                append(program, writer)
            tell(program, region)
        else:
            program.notes.append(located(replace(no, path=region.site.name, source=region.site.source), writers[0]))
    if program.appends:
        output = results(program)
        gone = {at for done in program.appends for at in done.outputs}
        output.args = (tuple(result for at, result in enumerate(output.args[0]) if at not in gone),)
        relax_views(program.gm.graph)


def tell(program: Program, region: Region) -> None:
    """A site that was rewritten says so too; one whose attention stays has been rewritten now."""
    name = region.site.name
    for at, rewrite in enumerate(program.rewrites):
        if rewrite.site.name == name:
            program.rewrites[at] = replace(rewrite, note=", ".join(filter(None, (rewrite.note, LOWERING))))
            return
    stays = [no for no in program.refusals if no.path == name]
    program.refusals[:] = [no for no in program.refusals if no.path != name]
    program.rewrites.append(Rewrite(region.site, LOWERING, note="; ".join(no.reason for no in stays)))


def results(program: Program) -> Node:
    (output,) = (n for n in program.gm.graph.nodes if n.op == "output")
    return output


def kept(program: Program, writer: Node) -> bool:
    """Whether what a node writes goes on into the next call, whole or in part."""
    if writer.target != aten.cat.default:
        return False
    returned = results(program).args[0]
    return any(node in returned for node in (writer, *(u for u in writer.users if u.target == aten.slice.Tensor)))


def obstacle(program: Program, writer: Node) -> Refusal | None:
    """Why a concatenation that goes on into the next call cannot be an append; None where it can."""
    if writer not in results(program).args[0]:
        return Refusal("only a window of its keys or values goes on, and moves at every call", code="append-window")
    if program.needs_grad:
        return Refusal("gradients are asked of the graph, and need the old keys as they were", code="append-gradient")
    if program.recorded:
        return Refusal("calls are recorded as CUDA graphs, whose inputs stay where they are", code="append-recorded")
    parts, dim = writer.args[0], argument(writer, 1, "dim", 0)
    past, new = parts[0], parts[-1]
    if len(parts) != 2 or past.op != "placeholder" or past.meta["val"].ndim != 4 or dim % 4 != 2:
        seen = f"{len(parts)} tensors are joined in dim {dim}"
        return Refusal(f"{seen}, expected an input (B, heads, n, D) and new ones in dim 2", code="append-layout")
    held, added = past.meta["val"], new.meta["val"]
    if type(held) is not FakeTensor:
        return Refusal(f"its old keys or values are a {type(held).__name__}", code="append-layout")
    if held.dtype != added.dtype or held.device != added.device or held.requires_grad:
        seen = f"the old ones are in {held.dtype} on {held.device}, the new ones in {added.dtype} on {added.device}"
        return Refusal(seen, code="append-layout")
    written = any(user.target == aten.copy_.default and user.args[0] is past for user in past.users)
    continued = [u for u in past.users if u.target == aten.cat.default and u in results(program).args[0]]
    if written or past in results(program).args[0] or continued != [writer]:
        return Refusal("its old keys or values are written to, returned or continued twice", code="append-shared")
    if any(number_of(program, size) is None for size in (held.shape[2], added.shape[2])):
        seen = f"{added.shape[2]} positions are added to {held.shape[2]}"
        return Refusal(f"{seen}, expected numbers, or sizes that are inputs", code="append-layout")
    return None


def number_of(program: Program, size: Any) -> int | Node | None:
    """A size as a number, or as the input that it is at run time."""
    if isinstance(size, int):
        return size
    for node in program.gm.graph.nodes:
        held = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(held, torch.SymInt) and statically_known_true(held == size):
            return node
    return None


def has_room(past: torch.Tensor) -> bool:
    """Whether the strides of (B, heads, n, D) leave, or may leave, positions free behind those of each head."""
    (batch, _, length, dim), strides = past.shape, past.stride()
    expected = strides_of(past.shape, 1)
    rows = statically_known_true(strides[3] == 1) and statically_known_true(strides[2] == expected[2])
    heads = statically_known_true(batch == 1) or statically_known_true(strides[0] == past.shape[1] * strides[1])
    return rows and heads and not statically_known_true(strides[1] <= length * dim)


def longer(past: torch.Tensor, added: Any, roomy: bool) -> torch.Tensor:
    """The tensor without data that the graph takes in place of `past`."""
    batch, heads, length, dim = past.shape
    sizes = (batch, heads, length + added, dim)
    strides = past.stride() if roomy else strides_of(sizes, capacity(length + added))
    with past.fake_mode:
        return torch.empty_strided(sizes, strides, dtype=past.dtype, device=past.device)


def append(program: Program, writer: Node) -> None:
    """Write the new positions into the longer input; the output is dropped when all are dealt with."""
    graph, output = program.gm.graph, results(program)
    past, new = writer.args[0]
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    old, added = past.meta["val"], new.meta["val"].shape[2]
    begin, count = number_of(program, old.shape[2]), number_of(program, added)
    builder, roomy = Builder(program.gm, writer), has_room(old)
    full = longer(old, added, roomy)
    readers = [user for user in past.users if user is not writer]
    past.meta = {**past.meta, "val": full, "example_value": full}
    if readers:
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            read = builder.call(aten.slice.Tensor, past, 2, 0, begin)
        past.replace_all_uses_with(read, lambda user: user in readers)
    with graph.inserting_before(writer):
        written = builder.call(aten.slice_scatter.default, past, new, 2, begin)
    writer.replace_all_uses_with(written, lambda user: user is not output)
    with graph.inserting_before(output):
        copied = graph.call_function(aten.copy_.default, (past, written))
        copied.meta = dict(written.meta)
    at = tuple(n for n, result in enumerate(output.args[0]) if result is writer)
    number = count if isinstance(count, int) else 0
    where = inputs.index(count) if isinstance(count, Node) else None
    program.appends.append(Append(inputs.index(past), at, number, where, roomy, full))
