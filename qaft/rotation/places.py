"""Where each weight of a model meets the rotated spaces, as a table: module name -> Place.

R1 [hidden, hidden] turns the residual stream, R2 [head_dim, head_dim] the value heads of one layer, and R4's fused part
the space between up and down: down reads ``diag(signs) B``, up writes ``diag(signs)``, and B is what remains to be done
online, on down's input. An MLP without gate has no signs: what stands between its linears does not commute with them.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from qaft.arch.base import Arch
from qaft.errors import ModelError
from qaft.rotation import build_rotation
from qaft.rotation.base import Rotation
from qaft.rotation.blocks import BlockDiagonal
from qaft.rotation.choice import Choice, down_block
from qaft.rotation.mean_preserving import MeanPreserving
from qaft.rotation.place import Place, Side
from qaft.rotation.signs import Signs


def places_of(arch: Arch, choice: Choice, *, rotation: str, seed: int) -> dict[str, Place]:
    """Return module name -> place for every module that the chosen rotations change.

    R1, the R2 and the R4 of each layer get their own seeds, derived from ``seed``.

    Args:
        arch: names and sizes of the model.
        choice: which rotations are in use.
        rotation: a key of ``ROTATIONS``.
        seed: of all random signs.

    Raises:
        ModelError: a width has no such rotation, or the residual stream cannot be rotated.
        RecipeError: the rotation is not known.
    """
    places = _residual_places(arch, rotation, seed) if choice.residual else {}
    for layer in range(arch.num_layers):
        if choice.values[layer]:
            _add_value_rotation(places, arch, layer, rotation, seed)
        if choice.down[layer]:
            _add_down_rotation(places, arch, layer, rotation, seed)
    return places


def attention_rotation(arch: Arch, *, rotation: str) -> Rotation:
    """Return R3, [head_dim, head_dim], the same for queries and keys of every layer.

    It has no signs, as a kernel would compute it.

    Raises:
        ModelError: the head dimension has no such rotation.
    """
    return _rotation(rotation, arch.head_dim, None, where="head_dim")


def down_rotation(arch: Arch, *, rotation: str) -> Rotation:
    """Return B, the online part of R4: to be applied to the input of down in every layer.

    Raises:
        ModelError: the width of the MLP has no block.
    """
    block = _rotation(rotation, down_block(arch), None, where="intermediate_size")
    return BlockDiagonal(arch.intermediate_size, block)


def _residual_places(arch: Arch, rotation: str, seed: int) -> dict[str, Place]:
    if arch.residual_obstacle:
        raise ModelError(
            f"{arch.family.model_type}: the residual stream cannot be rotated: {arch.residual_obstacle}; set "
            "qat.rotation to adaptive, which then chooses among the other rotations, or to none"
        )
    r1, centers = Side(_residual_rotation(arch, rotation, seed)), arch.family.norm == "layer"
    places = {name: Place(reads=r1, centers="reads" if centers else None) for name in arch.sources()}
    places |= {name: Place(norm, reads=r1) for norm, linears in arch.readers() for name in linears}
    places |= {name: Place(writes=r1, centers="writes" if centers else None) for name in arch.writers()}
    return places


def _residual_rotation(arch: Arch, rotation: str, seed: int) -> Rotation:
    seed = _derive(seed, "residual")
    residual = _rotation(rotation, arch.hidden_size, seed, where="hidden_size")
    # A LayerNorm subtracts the mean, which only a rotation that keeps it commutes with.
    return MeanPreserving(arch.hidden_size, seed=seed) if arch.family.norm == "layer" else residual


def _add_value_rotation(places: dict[str, Place], arch: Arch, layer: int, rotation: str, seed: int) -> None:
    value, output = arch.value_outputs()[layer]
    r2 = _rotation(rotation, arch.head_dim, _derive(seed, f"value.{layer}"), where="head_dim")
    heads, turned = arch.value_heads()
    places[value] = replace(places.get(value, Place()), writes=_side(r2, heads, turned))
    places[output] = replace(places.get(output, Place()), reads=Side(r2, arch.num_heads))


def _add_down_rotation(places: dict[str, Place], arch: Arch, layer: int, rotation: str, seed: int) -> None:
    up, down = arch.up_downs()[layer]
    block = down_block(arch)
    rows, gated = arch.up_rows()
    seed_of_signs = _derive(seed, f"down.{layer}") if gated else None
    r4 = _rotation(rotation, block, seed_of_signs, where="intermediate_size")
    places[down] = replace(places.get(down, Place()), reads=Side(r4, arch.intermediate_size // block))
    if gated:
        assert seed_of_signs is not None
        signs = Signs(block, seed=seed_of_signs)
        turned = range(gated.start // block, gated.stop // block)
        places[up] = replace(places.get(up, Place()), writes=_side(signs, rows // block, turned))


def _side(rotation: Rotation, blocks: int, turned: range) -> Side:
    return Side(rotation, blocks, None if turned == range(blocks) else turned)


def _rotation(kind: str, size: int, seed: int | None, *, where: str) -> Rotation:
    try:
        rotation = build_rotation(kind, size, seed=seed)
    except ModelError as error:
        raise ModelError(f"{where}={size}: {error}") from error
    assert rotation is not None
    return rotation


def _derive(seed: int, purpose: str) -> int:
    # Hashed, so that no two purposes share signs whatever the seeds are; 7 bytes fit every generator.
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")
