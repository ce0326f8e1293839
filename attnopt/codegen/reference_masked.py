"""The plain-PyTorch target of masked attention: the form evaluated at every position; any device, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.codegen.spec import MaskedPrefill
from attnopt.masks.evaluate import Evaluation
from attnopt.masks.kernel_form import Form, form_from
from attnopt.registry import TARGETS


def evaluation(
    shape: tuple[int, int, int, int], tensors: Sequence[Tensor], sizes: Sequence[int], device: torch.device
) -> Evaluation:
    """Of a form at every position of scores (B, H, Sq, Sk)."""
    position = {
        name: torch.arange(size, device=device).view([-1 if d == n else 1 for d in range(4)]).expand(shape)
        for n, (name, size) in enumerate(zip("bhij", shape, strict=True))
    }
    position |= {f"s{n}": torch.tensor(size, device=device).expand(shape) for n, size in enumerate(sizes)}
    return Evaluation(position, lambda slot: tensors[slot.number])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    sink: Tensor | None,
    scale: float,
    form: Form,
) -> Tensor:
    """q (B, H, Sq, D), k (B, G, Sk, D), v (B, G, Sk, Dv) -> (B, H, Sq, Dv). A row with no kept key is 0.

    tensors, sizes: what the form's slots and sizes stand for; sink: (H,) or (B, H, Sq) as the form says. Scores and
    soft-max in float32, or in float64 for float64 inputs.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(repeat, 1) for x in (k, v))
    scores = q.to(wide) @ keys.transpose(-1, -2) * scale
    shape = (scores.shape[0], scores.shape[1], scores.shape[2], scores.shape[3])
    at = evaluation(shape, tensors, sizes, q.device)
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    if form.added.terms:
        scores = scores + at.sum(form.added).to(wide)
    keep = at.predicate(form.keep)
    # A number that hides a key, such as a dtype's smallest, may be added as data.
    scores = scores.masked_fill(~keep, float("-inf"))
    if form.sink:
        column = scores.new_zeros(()) if sink is None else sink.to(wide)
        column = column[:, None] if form.sink == "h" else column
        scores = torch.cat([scores, column.expand(shape[:3])[..., None]], -1)
    weights = torch.softmax(scores, -1)[..., : shape[3]].masked_fill(~keep.any(-1, keepdim=True), 0.0)
    return (weights @ values).to(q.dtype)


@TARGETS.register("reference masked_prefill")
class ReferenceMasked:
    @staticmethod
    def emit(spec: MaskedPrefill) -> str:
        """Source of a module with ``attend`` (see above), which holds the form as text."""
        form = form_from(spec.form)
        return f'''"""{spec}.

{form}.
"""

import functools

from attnopt.codegen.reference_masked import attend
from attnopt.masks.kernel_form import form_from

attend = functools.partial(attend, form=form_from({spec.form!r}))
'''
