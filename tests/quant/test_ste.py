from __future__ import annotations

import pytest
import torch
from torch import nn

from qaft.quant.ste import straight_through


def test_the_value_is_quantized_and_the_gradient_passes() -> None:
    weight = nn.Parameter(torch.tensor([0.4, 1.6]))
    value = straight_through(weight, weight.detach().round(), None)
    value.backward(torch.tensor([3.0, -5.0]))
    assert value.tolist() == [0.0, 2.0]
    assert weight.grad is not None and weight.grad.tolist() == [3.0, -5.0]


def test_the_mask_stops_the_gradient_outside_the_range() -> None:
    weight = nn.Parameter(torch.tensor([-9.0, -1.2, 0.3, 8.0]))
    inside = weight.detach().abs() <= 2
    straight_through(weight, weight.detach().round().clamp(-2, 2), inside).backward(torch.ones(4))
    assert weight.grad is not None and weight.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_the_gradient_equals_that_of_clamp_when_rounding_is_ignored(generator: torch.Generator) -> None:
    data = torch.randn(64, generator=generator) * 2
    reference, weight = nn.Parameter(data.clone()), nn.Parameter(data.clone())
    upstream = torch.randn(64, generator=generator)
    reference.clamp(-1, 1).backward(upstream)
    straight_through(weight, data.clamp(-1, 1).round(), data.abs() <= 1).backward(upstream)
    assert weight.grad is not None and torch.equal(weight.grad, reference.grad)


@pytest.mark.parametrize("masked", [False, True])
def test_backward_keeps_at_most_one_byte_per_element(masked: bool) -> None:
    kept: list[int] = []
    weight = nn.Parameter(torch.randn(10, 10))
    inside = weight.detach() > 0 if masked else None

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        straight_through(weight, weight.detach().round(), inside)
    assert sum(kept) == (100 if masked else 0)


def test_the_quantized_values_get_no_gradient() -> None:
    weight, quantized = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    straight_through(weight, quantized, None).sum().backward()
    assert quantized.grad is None


def test_the_gradient_has_the_dtype_of_the_latent() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    straight_through(weight, torch.ones(2), None).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


def test_a_frozen_latent_gives_a_frozen_result() -> None:
    assert not straight_through(torch.ones(2), torch.zeros(2), None).requires_grad
