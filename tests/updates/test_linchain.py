"""What is special to chains: they start as LoRA, and end as one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qaft.bases.base import LinearSpec
from qaft.updates.linchain import LinChain
from qaft.updates.lowrank import LowRank

SPEC = LinearSpec(name="layer", out_features=12, in_features=10, input_scale=0.5, seed=3)


def base(x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, torch.arange(120.0).view(12, 10).sin())


def gradients(update: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    functional = torch.randn(7, 12, generator=torch.Generator().manual_seed(5))
    (update(x, base) * functional).sum().backward()
    return {name: p.grad for name, p in update.named_parameters()}


def test_depth_0_is_lora_bit_for_bit() -> None:
    chain, lora = LinChain(SPEC, rank=4, depth=0), LowRank(SPEC, rank=4)
    assert torch.equal(chain.down, lora.down)
    for update in (chain, lora):
        update.up.data = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    x, w = torch.randn(7, 10), torch.randn(12, 10)
    assert torch.equal(chain(x, base), lora(x, base))
    assert torch.equal(chain.merge(w), lora.merge(w))
    left, right = gradients(chain, x), gradients(lora, x)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_first_step_is_that_of_lora() -> None:
    x = torch.randn(7, 10)
    chain, lora = gradients(LinChain(SPEC, rank=4, depth=3), x), gradients(LowRank(SPEC, rank=4), x)
    assert torch.equal(chain["up"], lora["up"])
    assert not any(chain[f"chain.{j}"].any() for j in range(3))


def test_the_chain_collapses_to_a_lora_of_the_same_rank() -> None:
    chain = LinChain(LinearSpec(name="layer", out_features=12, in_features=10, dtype=torch.float64), rank=4, depth=3)
    for parameter in chain.parameters():
        parameter.data.normal_()
    factors = chain.low_rank_factors()
    assert factors.down.shape == (4, 10)
    assert torch.equal(factors.down, chain.down)
    x = torch.randn(7, 10, dtype=torch.float64)
    expected = chain(x, lambda v: torch.zeros(7, 12, dtype=v.dtype))
    torch.testing.assert_close(x @ factors.down.T @ factors.up.T, expected, atol=1e-11, rtol=1e-12)
    assert torch.linalg.matrix_rank(factors.up @ factors.down) == 4


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 11}, {"depth": -1}])
def test_impossible_options_name_the_layer_the_value_and_the_range(options) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"layer: {name}={value} must be"):
        LinChain(SPEC, **options)
