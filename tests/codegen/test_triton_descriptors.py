"""Which tensors descriptors can load, on which devices, and what a descriptor is made of."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen import triton_descriptors
from attnopt.codegen.triton_descriptors import descriptor, descriptors_serve


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


SERVED = {
    "a projection, transposed": half(2, 70, 4, 64).transpose(1, 2),
    "contiguous": half(2, 4, 70, 64),
    "part of a joint projection": half(2, 70, 12, 64)[:, :, 4:8].transpose(1, 2),
    "part of a cache": half(2, 4, 100, 64)[:, :, :70],
    "24 features": half(2, 4, 70, 24),
    "an odd stride along an axis of one": half(1, 4, 70, 64).as_strided((1, 4, 70, 64), (4481, 4480, 64, 1)),
}
REFUSED = {
    "a base off by one": half(2, 4, 70, 72)[..., 1:65],
    "rows of an odd size": half(2, 4, 70, 65)[..., :64],
    "expanded heads": half(2, 1, 70, 64).expand(2, 4, 70, 64),
    "strided features": half(2, 4, 64, 72).transpose(2, 3),
    "empty": half(0, 4, 70, 64),
}


@pytest.mark.parametrize("name", SERVED)
def test_aligned_tensors_are_served(name: str) -> None:
    assert descriptors_serve(SERVED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_other_tensors_are_not(name: str) -> None:
    assert not descriptors_serve(REFUSED[name])
    assert not descriptors_serve(SERVED["contiguous"], REFUSED[name])


@pytest.mark.parametrize(
    ("capability", "served"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_devices_with_bulk_copies_and_their_shared_memory(
    capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert triton_descriptors._has_descriptors(torch.device("cuda")) == served
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not triton_descriptors._has_descriptors(torch.device("cuda"))


@pytest.mark.parametrize("name", SERVED)
def test_a_descriptor_is_the_tensor_where_it_lies(name: str) -> None:
    pytest.importorskip("triton")
    tensor = SERVED[name]
    made = descriptor(tensor, 64, 64)
    assert made.base.data_ptr() == tensor.data_ptr()
    assert list(made.shape) == list(tensor.shape) and made.block_shape == [1, 1, 64, 64]
    used = [axis for axis in range(4) if tensor.shape[axis] > 1]
    assert [made.strides[axis] for axis in used] == [tensor.stride(axis) for axis in used]
    assert all(step * 2 % 16 == 0 for step in made.strides[:3]) and made.strides[3] == 1
