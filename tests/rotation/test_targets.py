from __future__ import annotations

from dataclasses import replace

import pytest

from qaft.arch.base import Arch
from qaft.arch.llama import LLAMA
from qaft.errors import RecipeError
from qaft.rotation.targets import TARGETS, available_rotations

ARCH = Arch(
    family=LLAMA,
    num_layers=1,
    hidden_size=48,
    intermediate_size=72,
    head_dim=20,
    num_heads=6,
    num_kv_heads=2,
    tied=False,
)


def _online(
    target: str, *, activations: bool = True, cached_keys: bool = True, biased: bool = False
) -> tuple[bool, bool]:
    found = available_rotations(ARCH, target, activations=activations, cached_keys=cached_keys, biased_down=biased)
    assert found.residual and all(found.values)
    return found.down[0], found.attention[0]


@pytest.mark.parametrize(
    ("target", "online"), [("portable", (False, False)), ("vllm", (True, False)), ("simulation", (True, True))]
)
def test_a_target_has_the_online_rotations_that_it_runs(target: str, online: tuple[bool, bool]) -> None:
    assert _online(target) == online


def test_vllm_has_no_input_rotation_of_a_layer_with_bias() -> None:
    assert _online("vllm", biased=True) == (False, False)
    assert _online("simulation", biased=True) == (True, True)


def test_an_online_rotation_is_there_only_for_what_is_quantized() -> None:
    assert _online("simulation", activations=False) == (False, True)
    assert _online("simulation", cached_keys=False) == (True, False)


def test_a_family_whose_stream_cannot_be_rotated_has_no_r1() -> None:
    arch = replace(ARCH, residual_obstacle="because")
    assert not available_rotations(arch, "portable", activations=True, cached_keys=True, biased_down=False).residual


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match=rf"qat\.target='vlm': must be one of {', '.join(TARGETS)}; did you mean 'vllm'"
    ):
        _online("vlm")
