"""Everything that knows transformers.

loading.py     finding and loading models and their tokenizers
sites.py       which modules of a model attend, and which models cannot be served
cache.py       SpanCache: a KV cache that holds what the plan keeps
span_layer.py  one layer of it
token_state.py what a layer holds where heads select what a step reads
prompts.py     heads that select blocks of keys while a prompt runs
attention.py   the attention and the mask function that transformers calls by the name "attnopt"
generation.py  enable and disable
explained.py   generation_of, for attnopt.explain
benchmark.py   decoding timed with transformers' caches and with a SpanCache

Only loading.py is imported with this package, and it imports transformers when a model is asked for.
"""

from attnopt.hf.loading import (
    ALIASES,
    DTYPES,
    Loaded,
    demo_model_path,
    dtype_of,
    from_callable,
    load,
    tokenizer_of,
    transformers,
)

__all__ = [
    "ALIASES",
    "DTYPES",
    "Loaded",
    "demo_model_path",
    "dtype_of",
    "from_callable",
    "load",
    "tokenizer_of",
    "transformers",
]
