"""What changes a fingerprint and what does not."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.errors import ModelError, ProfileError
from attnopt.fingerprint import SAMPLES, Fingerprint, fingerprint_of, mismatch
from attnopt.ir import Mask, Site


class Model(nn.Module):
    def __init__(self, config: Any = None, layers: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(layers))
        self.norm = nn.LayerNorm(24)
        if config is not None:
            self.config = config


def model(seed: int = 0, **kwargs: Any) -> Model:
    torch.manual_seed(seed)
    return Model(**kwargs)


def site(path: str = "layers.0", **changes: Any) -> Site:
    base = Site(path, 0, "sdpa", 4, 2, 8, 8, 8**-0.5, "float32", Mask(causal=True))
    return dataclasses.replace(base, **changes)


SITES = [site("layers.0"), site("layers.1")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_does_not_change_the_model(dtype: torch.dtype) -> None:
    one = fingerprint_of(model(), SITES)
    other = fingerprint_of(model().to(dtype), [dataclasses.replace(s, dtype=str(dtype)) for s in SITES])
    assert one.structure == other.structure
    assert mismatch(one, other) == ""
    assert len(one.samples) == 12 <= SAMPLES


def test_compiling_does_not_change_the_model() -> None:
    plain = model()
    wrapped = [dataclasses.replace(s, path=f"_orig_mod.{s.path}") for s in SITES]
    assert fingerprint_of(torch.compile(plain, backend="eager"), wrapped) == fingerprint_of(plain, SITES)
    regional = copy.deepcopy(plain)
    regional.layers[3] = torch.compile(regional.layers[3], backend="eager")
    assert fingerprint_of(regional, SITES) == fingerprint_of(plain, SITES)


def test_other_weights_are_another_model() -> None:
    one, other = fingerprint_of(model(0), SITES), fingerprint_of(model(1), SITES)
    assert one.structure == other.structure
    assert "different weights" in mismatch(one, other)


def test_a_few_steps_of_training_are_noticed() -> None:
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    for _ in range(5):
        x = torch.randn(8, 24)
        for layer in trained.layers:
            x = torch.tanh(layer(x))
        x.square().sum().backward()
        optimizer.step()
    assert mismatch(fingerprint_of(model(), SITES), fingerprint_of(trained, SITES))


@pytest.mark.parametrize(
    "sites",
    [
        SITES[::-1],
        SITES[:1],
        [SITES[0], site("layers.1", heads=8)],
        [SITES[0], site("layers.1", kv_heads=4)],
        [SITES[0], site("layers.1", head_dim=16)],
        [SITES[0], site("layers.1", head_dim_v=16)],
        [SITES[0], site("layers.1", ordinal=1)],
    ],
)
def test_other_sites_are_another_model(sites: list[Site]) -> None:
    assert "attentions" in mismatch(fingerprint_of(model(), SITES), fingerprint_of(model(), sites))


def test_volatile_configuration_is_left_out_at_every_depth() -> None:
    def with_config(dtype: Any, rope: float) -> Fingerprint:
        inner = {"dtype": dtype, "rope_theta": rope, "callback": object()}
        config = SimpleNamespace(
            hidden=24,
            torch_dtype=dtype,
            _attn_implementation=str(dtype),
            text_config=inner,
            transformers_version=str(dtype),
        )
        return fingerprint_of(model(config=config), SITES)

    assert with_config("float32", 1e4) == with_config(torch.bfloat16, 1e4)
    assert mismatch(with_config("float32", 1e4), with_config("float32", 1e6))


def test_transformers_configuration() -> None:
    transformers = pytest.importorskip("transformers")

    def of(implementation: str, layers: int) -> Fingerprint:
        config = transformers.LlamaConfig(num_hidden_layers=layers, attn_implementation=implementation)
        return fingerprint_of(model(config=config), SITES)

    assert of("eager", 2) == of("sdpa", 2)
    assert mismatch(of("sdpa", 2), of("sdpa", 3))


def test_norms_alone_still_have_samples() -> None:
    assert fingerprint_of(nn.LayerNorm(8), []).samples == (0.0, 1.0)
    assert fingerprint_of(nn.Identity(), []).samples == ()


def test_weights_that_are_not_loaded() -> None:
    with torch.device("meta"):
        empty = Model()
    with pytest.raises(ModelError, match="not loaded"):
        fingerprint_of(empty, SITES)


def test_json_round_trip_is_exact() -> None:
    one = fingerprint_of(model(), SITES)
    assert Fingerprint.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    "data", [None, {}, {"structure": "x"}, {"structure": 3, "samples": []}, {"structure": "x", "samples": ["y"]}]
)
def test_json_that_is_no_fingerprint(data: Any) -> None:
    with pytest.raises(ProfileError, match="fingerprint"):
        Fingerprint.from_json(data)
