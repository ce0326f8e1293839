"""The CPU target of linear far parts: what it emits."""

from attnopt.codegen import reference_linear
from attnopt.codegen.emit import load
from attnopt.codegen.spec import LinearPrefill


def test_emitted():
    module = load(LinearPrefill("cpu", "float32", 8, 4, 16, 24, 5, "exp", 24, False))
    assert module.prefill is reference_linear.prefill
