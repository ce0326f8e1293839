"""A graph as text: one line a node, the same for the same node, and diffs of what changed alone."""

from __future__ import annotations

import torch
from tracing import trace

from attnopt.passes.graph_text import changes, diffs, graph_text


def text_of(fn, *args, dynamic=False):
    return graph_text(trace(fn, *args, passes=(), dynamic=dynamic).program.gm.graph)


def test_a_line_has_name_operation_arguments_shape_and_dtype():
    def fn(x):
        low, high = x.split(2, dim=1)
        return torch.cat([low.to(torch.bfloat16), high.to(torch.bfloat16)], 0).contiguous(), x.shape

    lines = text_of(fn, torch.randn(3, 4)).splitlines()
    assert lines[0].endswith(" = input  [3, 4] float32")
    assert any(line.startswith("split = aten.split.Tensor(") and line.count("[3, 2] float32") == 2 for line in lines)
    assert "cat = aten.cat.default([_to_copy, _to_copy_1])  [6, 2] bfloat16" in lines
    assert any("dtype=bfloat16" in line for line in lines) and not any("torch." in line for line in lines)
    assert lines[-1] == "return [cat]"


def test_sizes_known_at_run_time_are_symbols():
    lines = text_of(lambda x: x.reshape(-1) * x.shape[0], torch.randn(3, 4), dynamic=True).splitlines()
    assert any("[s" in line for line in lines) and any(line.endswith("float32") for line in lines)


def test_a_diff_holds_changed_hunks_only():
    before = "".join(f"n{n} = aten.neg.default(n{n - 1})\n" for n in range(20))
    after = before.replace("n7 = aten.neg.default(n6)", "n7 = aten.abs.default(n6)")
    assert changes(before, before) == ""
    assert changes(before, after, "swap").splitlines() == [
        "--- before swap",
        "+++ after swap",
        "@@ -7,3 +7,3 @@",
        " n6 = aten.neg.default(n5)",
        "-n7 = aten.neg.default(n6)",
        "+n7 = aten.abs.default(n6)",
        " n8 = aten.neg.default(n7)",
    ]


def test_each_diff_is_from_the_last_text_that_was_kept():
    found = dict(diffs("a\n", [("one", "b\n"), ("idle", ""), ("two", "c\n")]))
    assert list(found) == ["one", "two"] and "-b\n+c" in found["two"] and "a" not in found["two"].split("@@")[2]
