"""The host's half of the emitted Triton gradients of linear attention: what is checked, and launched in which order."""

from __future__ import annotations

from attnopt.codegen.spec import LinearBackward
from attnopt.codegen.triton_linear_host import checks, states_launcher, upcast
from attnopt.codegen.triton_linear_text import maps_of


def launcher(spec: LinearBackward) -> str:
    heads, groups, served, dim, dim_v = spec.heads, spec.kv_heads, spec.served, spec.head_dim, spec.head_dim_v
    of_queries = ", ".join(f'"{name}"' for name in maps_of(spec, "q"))
    return f'''{checks(spec, "linear_dq")}{states_launcher(spec)}

def _behind(dout, q, v, delta, bound, far, maps, length, cut, launch):
    """What the rows behind those of each segment amount to."""
    count, size = cut
    states = _empty_states(q.shape[0], count, q.device)
    if count > 1:
        of_queries = [maps[name] for name in ({of_queries})]
        query_states[(q.shape[0] * {served} * (count - 1),)](
            *(dout, q, v, delta, bound, *states, *far[:3], *of_queries, length, count, count - 1, size),
            *_steps(dout, q),
            **launch["query_states"],
            **FUSED,
        )
        _add_up(states, count, True)
    return states


def backward(dout, dlse, q, k, v, out, lse, heads, sinks, windows, maps, pad=None):
    """Gradients at q (B, {heads}, N, {dim}), k (B, {groups}, N, {dim}) and v (B, {groups}, N, {dim_v}).

    Those of a prefill with the results out (B, {served}, N, {dim_v}) and lse (B, {served}, N) and the gradients dout
    and dlse at these; the rest as prefill has them. They are laid out as (B, N, heads, dim), and 0 for heads that are
    not served.
    """
    _check(q, k, v, pad)
    batch, length, dtype = q.shape[0], q.shape[2], q.dtype
    if dout.shape != out.shape or out.shape != (batch, {served}, length, {dim_v}) or lse.shape != out.shape[:3]:
        shapes = [tuple(x.shape) for x in (dout, out, lse)]
        raise ValueError(f"dout, out, lse have shapes {{shapes}}; this kernel serves {served} heads")
    far, tables = _far(heads, sinks, windows, pad, length, q.device)
    maps = _maps(maps, q.device){upcast(spec, "dout, q, k, v, out")}
    dout, q, k, v, out = _rows(dout, q, k, v, out)
    dlse, lse = dlse.float().contiguous(), lse.contiguous()
    dq = torch.zeros((batch, length, {heads}, {dim}), dtype=q.dtype, device=q.device).transpose(1, 2)
    sizes = ((batch, length, {groups}, width) for width in ({dim}, {dim_v}))
    dk, dv = (torch.zeros(size, dtype=torch.float32, device=q.device) for size in sizes)
    delta, bound = torch.empty_like(lse), torch.empty_like(lse)
    if lse.numel():
        with torch.cuda.device_of(q):
            launch = launches(q.device)
            # All kernels cut the keys alike; a program of linear_dkv has all heads of a KV head.
            cut = segments(tables.keys, batch * {groups}, max(x["BLOCK"] for x in launch.values()), q.device)
            tiles = triton.cdiv(length, SUMMED)
            row_sums[(batch * {served} * tiles,)](
                dout, out, dlse, lse, delta, bound, length, *_steps(dout, out), BLOCK=SUMMED, **FUSED
            )
            states = _before(k, v, far, maps, length, cut, launch)
            linear_dq[(batch * {served} * cut[0],)](
                *(dout, q, k, v, dlse, delta, bound, dq, *states, *far, *maps.values(), length, *cut),
                *_steps(dout, q, k, v, dq),
                **launch["linear_dq"],
                **FUSED,
            )
            states = _behind(dout, q, v, delta, bound, far, maps, length, cut, launch)
            linear_dkv[(batch * {groups} * cut[0],)](
                *(dout, q, k, v, delta, bound, dk, dv, *states, *far, tables.groups, *maps.values(), length, *cut),
                *_steps(dout, q, k, v),
                **launch["linear_dkv"],
                **FUSED,
            )
    return dq.to(dtype), dk.to(dtype).transpose(1, 2), dv.to(dtype).transpose(1, 2)
'''
