"""Finding and loading models and their tokenizers."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from attnopt.errors import DependencyError, ModelError, OptionError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OWN_CODE = "Nothing that lies with a model is run. Build it in code that you trust, and give that as module:callable."
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class Loaded:
    """A model in evaluation mode, its tokenizer if it has one, and the name it was asked for by. note: why a tokenizer
    that is there could not be loaded."""

    model: nn.Module
    tokenizer: Any
    name: str
    note: str = ""


def demo_model_path() -> Path:
    """The small trained model that ships with attnopt."""
    return Path(__file__).parent.parent / "assets" / "demo_model"


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a name such as "bf16"."""
    full = ALIASES.get(name, name)
    if full not in DTYPES:
        raise OptionError(f"{name!r} is no dtype attnopt runs.", f"Use {', '.join([*ALIASES, *DTYPES])}.")
    return DTYPES[full]


def transformers() -> Any:
    try:
        import transformers as module
    except ImportError as error:
        raise DependencyError(
            "transformers is not installed.", 'Install it with `pip install "attnopt[hf]"`.'
        ) from error
    return module


def load(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", attention: str = "sdpa", as_saved: bool = False
) -> Loaded:
    """Load MODEL: "demo", a local directory in transformers format, a hub name, or ``module:callable``.

    The callable returns a module, or a (module, tokenizer) pair. `attention` is transformers' attn_implementation.
    as_saved: of the class that was saved, whatever it is for; else a causal language model.
    """
    if name == "demo":
        return load(str(demo_model_path()), dtype, device, attention, as_saved)
    path = Path(name)
    if ":" in name and not path.exists():
        return from_callable(name, dtype, device)
    if path.exists() and not (path / "config.json").exists():
        raise ModelError(
            f"{name} is not a model in transformers format: it has no config.json.", "Save it with save_pretrained()."
        )
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"There is no model at {name}.", "Give a directory, a hub name, or module:callable.")
    hf = transformers()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    if not path.exists():
        check_hub(name)
    try:
        cls = saved_class(name) if as_saved else hf.AutoModelForCausalLM
        model = cls.from_pretrained(name, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if needs_own_code(error):
            raise ModelError(f"{name} needs Python code of its own.", OWN_CODE) from error
        reason = first_line(error)
        if re.search("attn_implementation|attention", reason, re.I):
            raise OptionError(
                f"{name} cannot be loaded with --attention {attention}: {reason}", "Use eager or sdpa."
            ) from error
        if path.exists():
            raise ModelError(
                f"The model in {name} could not be loaded: {reason}",
                "Save it again with save_pretrained(), or copy all of its files.",
            ) from error
        offline = " (the hub is switched off by HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ModelError(
            f"{name} could not be loaded{offline}: {reason}",
            "Give a directory in transformers format, a hub name, or module:callable.",
        ) from error
    tokenizer, note = tokenizer_of(name)
    return Loaded(model.to(device).eval(), tokenizer, name, note)


def check_hub(name: str) -> None:
    """ModelError where a model is neither in the hub's cache nor on the hub: asked once, where transformers would ask
    again and again for half a minute. Whoever is offline on purpose is told by transformers."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # of the hub's own library, or of that which makes its connections
        raise ModelError(
            f"There is no folder {name}, and the hub does not give it: {first_line(error)}",
            "Give a directory in transformers format, a hub name, or module:callable.",
        ) from error


def saved_class(name: str) -> Any:
    """The class that a model was saved from; the one for causal language models where its configuration names none."""
    hf = transformers()
    named = hf.AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or ()
    return next((cls for n in named if (cls := getattr(hf, n, None)) is not None), hf.AutoModelForCausalLM)


def tokenizer_of(name: str) -> tuple[Any, str]:
    """The tokenizer saved beside a model, or None; and why one that is there could not be loaded."""
    try:
        return transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False), ""
    except Exception as error:  # a tokenizer's own package may be missing or old, and raises what it likes
        there = isinstance(error, ImportError) or any(Path(name).glob("tokenizer*"))
        reason = first_line(error)
        if needs_own_code(error):
            reason = f"it needs Python code of its own. {OWN_CODE}"
        return None, f"The tokenizer of {name} could not be loaded: {reason}" if there else ""


def needs_own_code(error: Exception) -> bool:
    """Whether transformers would have to run code that lies with the model."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def from_callable(name: str, dtype: torch.dtype, device: str) -> Loaded:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{name} could not be called: {error}.", "Give it as module:callable, importable from here."
        ) from error
    except Exception as error:  # the module is the user's
        raise ModelError(f"{module_name} could not be imported: {told(error)}", "Mend it, or name another.") from error
    try:
        made = make()
    except Exception as error:  # and so is the callable
        raise ModelError(f"{name} failed: {told(error)}", "It is called without arguments; mend it.") from error
    model, tokenizer = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name} returned a {type(model).__name__}.", "It must return a torch module, or (module, tokenizer)."
        )
    if next(model.parameters(), None) is None:
        raise ModelError(f"{name} returned a module without parameters.", "Give a whole model, embeddings included.")
    return Loaded(model.to(device, dtype).eval(), tokenizer, name)


def told(error: Exception) -> str:
    """What a user's own code raised, and the last line of it that is at fault."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(error.filename or '?').name}:{error.lineno}" if isinstance(error, SyntaxError) else ""
    if not where and frames:
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    message = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {message}" + (f" ({where})" if where else "")
