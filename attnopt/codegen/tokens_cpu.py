"""A step of heads that select tokens on the CPU: the compiled kernel, tokens.cpp, or torch's operators without it."""

from attnopt.codegen.reference_token_step import step

__all__ = ["step"]
