"""The CPU target of linear far parts: modules that bind the functions of attnopt/codegen/reference_linear.py."""

from __future__ import annotations

from attnopt.codegen.reference_linear import module_text
from attnopt.codegen.spec import LinearBackward, LinearDecode, LinearPrefill
from attnopt.registry import TARGETS


@TARGETS.register("cpu linear_prefill")
class Prefill:
    @staticmethod
    def emit(spec: LinearPrefill) -> str:
        return module_text(spec, "prefill")


@TARGETS.register("cpu linear_backward")
class Backward:
    @staticmethod
    def emit(spec: LinearBackward) -> str:
        return module_text(spec, "backward")


@TARGETS.register("cpu linear_decode")
class Decode:
    @staticmethod
    def emit(spec: LinearDecode) -> str:
        return module_text(spec, "decode, state")
