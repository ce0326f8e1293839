"""What the loss of a profile is of: which tokens count, with which labels, and its gradient at the logits.

    model          labels drawn from the model's own next-token distribution at every counted token, once a draw: half
                   the sum of squares is then the divergence from the dense model (attnopt/statistics)
    data           the tokens that really follow: the gradient of the task's own loss
    continuation   as model, on text that the model itself wrote after a prompt, counted on what it wrote only

A weight w of a token weighs its term: of the loss under data labels, of the divergence under model labels. The latter
is a sum of squares of gradients, so there the gradient is multiplied by the root of w.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import ModelError, OptionError, ProfileError, TextError
from attnopt.instrument import logits_of

LABELS = ("model", "data", "continuation")
# Rows of logits turned into labels and gradients at a time: 256 x a 128k vocabulary in float32 is 130 MB.
ROWS = 256
# What autograd calls operations that keep nothing of their result, so that it may be overwritten.
KEEPS_NOTHING = ("MmBackward0", "AddmmBackward0", "BmmBackward0")
SAME_STORAGE = ("UnsafeViewBackward0", "ViewBackward0", "ReshapeAliasBackward0")


@dataclass(frozen=True)
class Sample:
    """One sequence to profile on.

    ids: int64 (1, N). weights: float32 (N,), of each token as something to predict, 0 where it does not count (prompts;
    -100 in the labels of transformers); None where every prediction counts alike. kind: what it is, for the header.
    temperature: logits are divided by it before labels are drawn, and their gradient is not: 1/2 t^2 is then its square
    times the divergence of the softened distributions (as in Hinton et al., arXiv:1503.02531, section 2). For answers
    that the model is sure of, whose own divergence is nearly nothing however much the margin shrinks.
    """

    ids: Tensor
    weights: Tensor | None = None
    kind: str = "text"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape[0] != 1:
            raise TextError(f"A sequence has the shape {tuple(self.ids.shape)}.", "Give token ids of shape (1, N).")
        if self.weights is None:
            return
        if self.weights.shape != self.ids.shape[1:] or not bool((self.weights >= 0).all()):
            raise TextError(
                f"The weights of a sequence of {self.length} tokens are {tuple(self.weights.shape)}, or negative.",
                "Give one weight of 0 or more for each token.",
            )
        # No row predicts the first token.
        if not float(self.weights[1:].sum()) > 0:
            raise TextError(
                f"Every label of a sequence of {self.length} tokens is masked: it has no loss.",
                "Give answers that are counted, within the length that is profiled.",
            )

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def mark(self) -> str:
        """Hash of tokens and weights."""
        content = self.ids.to(torch.int64).cpu().numpy().tobytes()
        if self.weights is not None:
            content += self.weights.float().cpu().numpy().tobytes()
        if self.temperature != 1.0:
            content += f"temperature {self.temperature:g}".encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def row_weights(self, labels: str) -> Tensor:
        """float32 (N,): the weight of what each row predicts, the next token. What the last row predicts is not in the
        text: it counts where labels are drawn and everything counts."""
        weights = torch.ones(self.length) if self.weights is None else self.weights.float().cpu()
        last = weights.new_ones(1) if self.weights is None and labels != "data" else weights.new_zeros(1)
        return torch.cat((weights[1:], last))

    def supervision(self, labels: str) -> str:
        """What a profile's header says of it."""
        counted = {"text": "text", "chat": "chat answers", "probe": "probe answers"}.get(self.kind, self.kind)
        softened = f", softened {self.temperature:g} times" if self.temperature != 1.0 else ""
        return f"{'data' if labels == 'data' and not softened else 'model'} labels on {counted}{softened}"


def check_labels(labels: str, draws: int) -> None:
    if labels not in LABELS:
        raise OptionError(f"{labels!r} are no labels.", f"Use {', '.join(LABELS)}.")
    if draws < 1:
        raise OptionError(f"{draws} draws of labels are none.", "Use 1 or more.")
    if draws > 1 and labels == "data":
        raise OptionError("The data's labels are not drawn.", "Leave --draws away, or use --labels model.")


def loss_and_gradient(
    logits: Tensor, sample: Sample, labels: str, generator: torch.Generator, overwrite: bool = False
) -> tuple[float, Tensor]:
    """The weighted cross-entropy, summed, in nats, and the gradient at logits (1, N, V) to give to `backward`.

    overwrite: the gradient may take the place of the logits, where autograd does not need them any more.
    """
    weights = sample.row_weights(labels)
    held = logits.detach()[0]
    gradient = held if overwrite and disposable(logits) else torch.empty_like(held)
    drawn = labels != "data" or sample.temperature != 1.0
    targets = None if drawn else sample.ids[0].to(held.device).roll(-1)
    total = 0.0
    for start in range(0, sample.length, ROWS):
        rows = slice(start, min(start + ROWS, sample.length))
        weight = weights[rows]
        at = weight.nonzero()[:, 0].to(held.device)
        wide = held[rows][at].to(torch.promote_types(held.dtype, torch.float32))
        gradient[rows] = 0
        if not len(at):
            continue
        log_p = (wide / sample.temperature).log_softmax(-1)
        p = log_p.exp()
        if not bool(p.sum(-1).isfinite().all()):
            raise not_finite(sample, start)
        if targets is None:
            target = torch.multinomial(p.cpu(), 1, generator=generator).to(held.device)
        else:
            target = targets[rows][at, None]
        weight = weight.to(held.device, p.dtype)[at]
        loss = float((weight * -log_p.gather(-1, target)[:, 0]).sum())
        if not math.isfinite(loss):
            raise not_finite(sample, start)
        total += loss
        factor = weight if targets is not None else weight.sqrt()
        p.scatter_add_(-1, target, p.new_full(target.shape, -1.0)).mul_(factor[:, None])
        gradient[start + at] = p.to(gradient.dtype)
    return total, gradient[None]


def not_finite(sample: Sample, start: int) -> ProfileError:
    return ProfileError(
        f"The loss of a sequence of {sample.length} tokens is not finite, at token {start} or one of the next {ROWS}.",
        "Profile with --dtype fp32; if it is not finite there, the model's weights or this text are at fault.",
    )


def disposable(logits: Tensor) -> bool:
    """Whether the backward pass does without the values of the logits: a product's result, or a view of one."""
    node: Any = logits.grad_fn
    while node is not None and node.name() in SAME_STORAGE:
        node = node.next_functions[0][0]
    return node is not None and node.name() in KEEPS_NOTHING


@torch.no_grad()
def continued(model: nn.Module, prompt: Tensor, length: int, seed: int, greedy: bool = False) -> Sample:
    """`prompt`, int64 (1, P), continued by the model itself up to `length` tokens; only what it wrote counts.

    Sampled at temperature 1 from its whole distribution, or greedy. The labels are drawn anew when profiling, even
    if the continuation is greedy: the most likely token is no draw. A model with `generate` uses its cache.
    """
    ids, missing = prompt, length - prompt.shape[1]
    if missing < 1:
        raise TextError(f"A prompt of {prompt.shape[1]} tokens leaves nothing of {length} to write.", "Shorten it.")
    # torch.multinomial and `generate` draw from the global state, which is put back.
    devices = [prompt.device] if prompt.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        if hasattr(model, "generate") and getattr(model, "generation_config", None) is not None:
            # An early end of the text would leave a shorter sequence, which is another length to plan for.
            how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            if not greedy:
                how = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
            mask = torch.ones_like(ids)
            found = model.generate(  # type: ignore[operator]
                ids, attention_mask=mask, max_new_tokens=missing, min_new_tokens=missing, num_beams=1, **how,
                pad_token_id=0,
            )  # fmt: skip
            ids = found if isinstance(found, Tensor) else found.sequences
        else:
            for _ in range(missing):
                last = logits_of(model, ids)[:, -1].float()
                following = last.argmax(-1, True) if greedy else torch.multinomial(last.softmax(-1), 1)
                ids = torch.cat((ids, following), -1)
    if ids.shape[1] != length:
        raise ModelError(
            f"The model wrote {ids.shape[1] - prompt.shape[1]} tokens where {missing} were asked for.",
            "Use --labels model, or a model that can be made to go on.",
        )
    weights = torch.zeros(length)
    weights[prompt.shape[1] :] = 1.0
    return Sample(ids, weights, f"its own {'greedy' if greedy else 'sampled'} continuation")
