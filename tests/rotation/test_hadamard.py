from __future__ import annotations

import hashlib

import pytest
import torch

from qaft.rotation.hadamard import Hadamard
from qaft.rotation.orders import hadamard_matrix

LARGE = [2560, 3584, 5120, 8192, 8960, 9728, 10944, 11008, 13824, 14336, 17408, 18944, 25600, 28672, 29568]


@pytest.mark.parametrize("size", [1, 2, 12, 48, 92, 172, 344, 576, 896])
@pytest.mark.parametrize("seed", [None, 3])
def test_it_is_signs_then_hadamard_over_the_root_of_n(size: int, seed: int | None) -> None:
    rotation = Hadamard(size, seed=seed)
    signs = rotation.get_buffer("signs").double()
    dense = signs.unsqueeze(1) * hadamard_matrix(size) / size**0.5
    torch.testing.assert_close(rotation(torch.eye(size, dtype=torch.float64)), dense, rtol=0, atol=1e-15)


def test_without_a_seed_there_are_no_signs_and_with_one_about_half_are_negative() -> None:
    assert Hadamard(1024).get_buffer("signs").eq(1).all()
    assert 400 < int(Hadamard(1024, seed=0).get_buffer("signs").eq(-1).sum()) < 624


@pytest.mark.parametrize("size", LARGE)
def test_a_large_width_keeps_norms_and_inverts(size: int, generator: torch.Generator) -> None:
    rotation = Hadamard(size, seed=1)
    x = torch.randn(2, size, dtype=torch.float64, generator=generator)
    y = rotation(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(rotation.inverse(y), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [4096, 11008])
def test_an_outlier_is_spread_evenly_over_all_elements(size: int) -> None:
    x = torch.zeros(size, dtype=torch.float64)
    x[5] = size**0.5
    torch.testing.assert_close(Hadamard(size, seed=0)(x).abs(), torch.ones(size, dtype=torch.float64))


def test_signs_come_first_so_that_a_constant_vector_is_spread_too() -> None:
    constant = torch.ones(4096)
    assert Hadamard(4096)(constant).abs().max() == 64
    assert Hadamard(4096, seed=0)(constant).abs().max() < 6


@pytest.mark.parametrize(
    ("size", "seed", "digest"),
    [
        (20, 0, "8fe3d6598d0774a4"),
        (64, 1, "a7927d6ab7a0fb3b"),
        (92, 0, "7466bde0078ba523"),
        (128, 2, "1b977a6fba9aede6"),
        (188, 0, "19a080595f10c217"),
        (344, 0, "d850e9a1275639ea"),
        (576, 0, "852c7f71bd04f3c3"),
        (896, 3, "11d549f9e311cdf1"),
        (1536, 0, "4b64dc1b9a990f39"),
        (2048, 7, "eeae21a3ed5c37a2"),
    ],
)
def test_the_rotation_of_a_width_and_a_seed_never_changes(size: int, seed: int, digest: str) -> None:
    # A run folder stores only the seed, so another matrix would make its weights unreadable.
    rotation = Hadamard(size, seed=seed)
    signs = rotation(torch.eye(size)).sign().to(torch.int8)
    assert hashlib.sha256(signs.numpy().tobytes()).hexdigest()[:16] == digest


def test_it_stores_nothing_and_survives_a_change_of_dtype() -> None:
    rotation = Hadamard(48, seed=2)
    x = torch.randn(3, 48)
    before = rotation(x)
    assert not rotation.state_dict() and not list(rotation.parameters())
    assert torch.equal(rotation.to(torch.bfloat16)(x), before)


def test_autocast_does_not_lower_its_precision(generator: torch.Generator) -> None:
    rotation = Hadamard(576, seed=0)
    x = torch.randn(4, 576, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rotation(x)
    assert torch.equal(inside, rotation(x))


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.int64: a rotation needs floating point"):
        Hadamard(4)(torch.ones(4, dtype=torch.long))


def test_its_description_names_size_factors_and_seed() -> None:
    assert repr(Hadamard(896, seed=5)) == "Hadamard(896, factors=(32, 28), seed=5)"
