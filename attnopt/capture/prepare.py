"""Make a Dynamo graph ready for the export: a copy in which nothing is opaque that could be open.

torch._transformer_encoder_layer_fwd(...)   ->   its attention and its feed-forward network, in plain calls
l_self_scaling.item()                       ->   0.125, under a guard, see `floats`
dropout(x, 0.1, training=False)             ->   x
torch.vmap(f)(x)                            ->   f's batched operations, see `vmapped`
_enter_autocast(...), _exit_autocast(...)   ->   the same states, entered for real while tracing
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from attnopt.capture import autocast
from attnopt.capture.floats import settle_float
from attnopt.capture.vmapped import open_vmaps


def prepared(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with its fast paths open, its floats constant and its autocast states marked."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    ready = GraphModule(gm, graph)
    ready.meta = dict(gm.meta)
    for node in list(ready.graph.nodes):
        if node.op == "call_function" and node.target in ENCODER_LAYER:
            node.target = encoder_layer
        elif node.op == "call_method" and node.target == "item" and len(node.args) == 1:
            settle_float(node)
        elif node.op == "call_function" and node.target in DROPOUT:
            open_dropout(node)
    open_vmaps(ready)
    autocast.mark(ready.graph)
    ready.recompile()
    return ready


# --- writes to what dropout returned ---------------------------------------------------------------------------------

# The signatures are alike: input, p, training.
DROPOUT = (F.dropout, torch.dropout, torch.ops.aten.dropout.default)


def open_dropout(node: Node) -> None:
    """Make what dropout returns writable; the export freezes it, since out of training it is the input itself.

    In training it is new: a copy that is written instead differs in nothing.
    """
    x, p, training, inplace = dropout_arguments(node)
    if not isinstance(x, Node) or not isinstance(p, (int, float)) or not 0 <= p <= 1 or inplace is not False:
        return
    if training is False or (training is True and p == 0):
        node.replace_all_uses_with(x)
        node.graph.erase_node(node)
        return
    held = node.meta.get("example_value")
    # Dynamo's own run has made the writes, also those through views.
    if isinstance(held, Tensor) and not held.is_inference() and held._version > 0:
        with node.graph.inserting_after(node):
            copy = node.graph.call_function(torch.clone, (node,))
        copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy, lambda user: user is not copy)


def dropout_arguments(node: Node) -> tuple[Any, Any, Any, Any]:
    """The input, p, training and inplace of a dropout; what ATen calls train is training."""
    names = ("input", "p", "training", "inplace") if node.target is F.dropout else ("input", "p", "train")
    given = {"p": 0.5, "training": True, "inplace": False, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given["input"], given["p"], given.get("train", given["training"]), given["inplace"]


# --- the fast path of nn.TransformerEncoderLayer --------------------------------------------------------------------

ENCODER_LAYER = (torch._transformer_encoder_layer_fwd, torch.ops.aten._transformer_encoder_layer_fwd.default)


def encoder_layer(
    src: Tensor, width: int, heads: int, qkv_weight: Tensor, qkv_bias: Tensor, out_weight: Tensor, out_bias: Tensor,
    gelu: bool, norm_first: bool, eps: float, norm1_weight: Tensor, norm1_bias: Tensor, norm2_weight: Tensor,
    norm2_bias: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor,
    mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """What ``aten::_transformer_encoder_layer_fwd`` computes on src (B, N, width), without gradients or dropout.

    The operator reads its mask as a boolean, whatever its dtype: nonzero drops the key.
    """

    def attend(x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = F.linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1)
        q, k, v = (t.view(batch, length, heads, width // heads).transpose(1, 2) for t in (q, k, v))
        keep = None if mask is None else kept(mask, mask_type)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return F.linear(out.transpose(1, 2).reshape(batch, length, width), out_weight, out_bias)

    def feed_forward(x: Tensor) -> Tensor:
        x = F.linear(x, up_weight, up_bias)
        return F.linear(F.gelu(x) if gelu else F.relu(x), down_weight, down_bias)

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), norm2_weight, norm2_bias, eps)

    if norm_first:
        src = src + attend(norm1(src))
        return src + feed_forward(norm2(src))
    src = norm1(src + attend(src))
    return norm2(src + feed_forward(src))


def kept(mask: Tensor, mask_type: int | None) -> Tensor:
    """The boolean mask of an encoder layer, true where a key counts, broadcast over (B, heads, N, N).

    Its types: 0 is (N, N), 1 is key padding (B, N), 2 is (B, heads, N, N).
    """
    keep = mask == 0
    if mask_type == 1:
        return keep[:, None, None, :]
    return keep
