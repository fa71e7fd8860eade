"""Which rotations the program that will run the export can carry out.

Fused rotations are plain weights, which everything runs. Online ones are extra work in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from qaft.arch.base import Arch
from qaft.errors import RecipeError
from qaft.registry import suggest
from qaft.rotation.choice import Choice


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a program can do while it runs a model.

    Attributes:
        down: rotate the input of down in blocks of a power of two (R4).
        biased_down: the same where down has a bias.
        attention: rotate queries and keys after RoPE (R3).
    """

    down: bool
    biased_down: bool
    attention: bool


TARGETS: dict[str, Target] = {
    # transformers, llama.cpp and every reader of plain weights.
    "portable": Target(down=False, biased_down=False, attention=False),
    # vLLM runs input transforms of linears without bias; its quantized KV cache rotates keys by itself.
    "vllm": Target(down=True, biased_down=False, attention=False),
    # The model as it is in training: what the paper evaluates.
    "simulation": Target(down=True, biased_down=True, attention=True),
}


def available_rotations(arch: Arch, target: str, *, activations: bool, cached_keys: bool, biased_down: bool) -> Choice:
    """Return the rotations that the target can run and that can matter; R1 also where the family excludes it is False.

    Args:
        arch: names and sizes of the model.
        target: a key of ``TARGETS``.
        activations: whether the inputs of linears are quantized; without, R4 gains nothing that it does not cost.
        cached_keys: whether keys are quantized by a function that does not rotate them itself.
        biased_down: whether down has a bias.

    Raises:
        RecipeError: the target is not known.
    """
    if target not in TARGETS:
        raise RecipeError(f"qat.target={target!r}: must be one of {', '.join(TARGETS)}{suggest(target, dict(TARGETS))}")
    can = TARGETS[target]
    return Choice.uniform(
        arch.num_layers,
        residual=arch.residual_obstacle is None,
        values=True,
        attention=can.attention and cached_keys,
        down=can.down and activations and (can.biased_down or not biased_down),
    )
