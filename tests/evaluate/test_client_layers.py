"""Models of bitsandbytes are compared by the weights that they hold, and come out of it as they were."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qaft.bases.bnb import FourBitBase
from qaft.evaluate.client_layers import held_weights


def four_bit_layer(width: int) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(width, 32, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight.data = torch.randn(32, width, generator=torch.Generator().manual_seed(0))
    layer.weight = layer.weight.to("cpu")
    return layer


@torch.no_grad()
@pytest.mark.parametrize("width", [64, 96])
def test_products_are_those_of_the_held_weights_also_where_the_kernel_is_wrong(width: int) -> None:
    net, x = nn.Sequential(four_bit_layer(width)).eval(), torch.randn(3, width)
    original = torch.randn(32, width, generator=torch.Generator().manual_seed(0))
    weight = FourBitBase.from_weight(original, None, dtype=torch.float32).dequantize()
    before = net[0]
    with held_weights(net):
        assert torch.equal(net(x), x @ weight.T)
    assert net[0] is before


def test_a_layer_that_has_run_on_a_cpu_is_refused() -> None:
    net = nn.Sequential(four_bit_layer(64))
    net[0].weight.quant_state.packing_format_for_cpu = True  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="rounded its scales"), held_weights(net):
        pass


def test_other_models_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    before = net[0]
    with held_weights(net):
        assert net[0] is before
