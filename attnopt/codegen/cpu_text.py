"""What emitted modules of the CPU targets have in common: the numbers of their spec, and a word about padding."""

from __future__ import annotations

from dataclasses import asdict

from attnopt.codegen.spec import KernelSpec

UNPADDED = """    if pad is not None:
        raise ValueError("emitted without a padding mask, called with one")
"""


def filled(template: str, spec: KernelSpec, **more: object) -> str:
    """The template with the fields of `spec` in it; {check} refuses a mask where the spec has none, {pad} is the mask
    that is handed on."""
    padded = getattr(spec, "padded", False)
    given = dict(check="" if padded else UNPADDED, pad="pad" if padded else "None")
    return template.format(spec=spec, **asdict(spec), **given, **more)
