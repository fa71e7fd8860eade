from __future__ import annotations

import pytest
import torch

from qaft.quant.masks import MASKS, check_mask, inside, wants_mask


@pytest.mark.parametrize(("ste", "passes"), [("clamp", [0, 0, 1, 1, 1, 0, 0]), ("trust", [0, 1, 1, 1, 1, 1, 0])])
def test_clamp_ends_at_the_outermost_levels_and_trust_half_a_step_beyond(ste: str, passes: list[int]) -> None:
    scaled = torch.tensor([-8.6, -8.5, -8.0, 0.3, 7.0, 7.5, 7.51])
    assert inside(scaled, -8.0, 7.0, ste=ste, half_step=0.5).int().tolist() == passes


def test_bounds_may_differ_between_groups() -> None:
    scaled, low = torch.tensor([[-3.0, 2.0], [-3.0, 2.0]]), torch.tensor([[-2.0], [-4.0]])
    assert inside(scaled, low, low + 5, ste="clamp", half_step=0.5).tolist() == [[False, True], [True, False]]


def test_trust_is_where_the_error_is_at_most_half_a_step(generator: torch.Generator) -> None:
    scaled = torch.randn(1000, generator=generator) * 6
    error = (scaled - scaled.round().clamp(-8, 7)).abs()
    assert torch.equal(inside(scaled, -8.0, 7.0, ste="trust", half_step=0.5), error <= 0.5)


def test_a_mask_is_built_only_for_a_gradient_that_may_be_stopped() -> None:
    latent, frozen = torch.zeros(1, requires_grad=True), torch.zeros(1)
    assert [wants_mask(latent, ste) for ste in MASKS] == [False, True, True]
    assert not wants_mask(frozen, "clamp")
    with torch.no_grad():
        assert not wants_mask(latent, "trust")


def test_an_unknown_mask_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="ste='soft' must be one of identity, clamp, trust"):
        check_mask("soft")
