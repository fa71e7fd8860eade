"""Recipe -> which rotations are in use: all that the target can run, or those that measurements favour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from qaft.arch import arch_of
from qaft.arch.base import Arch
from qaft.data import load_samples
from qaft.data.calibration import calibration_of
from qaft.errors import RecipeError
from qaft.models.layers import GRID_STORAGES, frozen_quantizer
from qaft.models.layerwise import LayerwiseModel
from qaft.models.measure import Grids, measure_rotations
from qaft.models.skeleton import block_linears, empty_model
from qaft.models.source import CheckpointSource, load_tokenizer
from qaft.quant import CODE_BOOKS, build_quantizer
from qaft.quant.activation import TokenQuantizer
from qaft.quant.affine import Affine
from qaft.quant.compressed_tokens import CompressedTensorsTokens
from qaft.quant.kv import KVQuantizer, RosteKV, VllmKV
from qaft.recipe import RUN_RECIPE, Recipe, load_recipe
from qaft.rotation import ADAPTIVE, rotation_kind
from qaft.rotation.choice import Choice
from qaft.rotation.choose import LayerErrors, choose
from qaft.rotation.targets import available_rotations
from qaft.sections import QatSection, RotatedSection
from qaft.train.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The lower-level problem of a recipe and its solution.

    Attributes:
        layers: errors of every decoder layer.
        available: rotations that the target can run.
        choice: those under which the error is least.
    """

    layers: Sequence[LayerErrors]
    available: Choice
    choice: Choice


def with_rotations(recipe: Recipe, source: CheckpointSource, selected: frozenset[str], device: torch.device) -> Recipe:
    """Return the recipe with ``qat.rotated`` set; unchanged without rotations, or where it is set already.

    A run that is continued keeps the rotations that it began with.

    Raises:
        RecipeError: ``adaptive`` without data to measure on.
        ModelError: a width has no such rotation, or the family is not known.
        DataError: there is nothing to calibrate on.
    """
    qat = recipe.qat
    if qat is None or qat.rotation == "none":
        return recipe
    # Rotations by hand are only where a run begins that chooses again.
    if qat.rotated is not None and qat.reselect_every is None:
        return recipe
    rotated = _rotated_of_run(recipe) or qat.rotated
    if rotated is None:
        choice = (
            measure(recipe, source, selected, device).choice
            if qat.rotation == ADAPTIVE
            else _everything(recipe, source)
        )
        rotated = RotatedSection.model_validate(choice.layers())
    return recipe.model_copy(update={"qat": qat.model_copy(update={"rotated": rotated})})


def choice_of(recipe: Recipe, source: CheckpointSource) -> Choice | None:
    """Return the rotations that ``qat.rotated`` lists, or None where it is not set.

    Raises:
        RecipeError: it names a layer that the model has not.
    """
    rotated = None if recipe.qat is None else recipe.qat.rotated
    return None if rotated is None else Choice.of_layers(arch_of(source.config).num_layers, **rotated.model_dump())


def measure(
    recipe: Recipe,
    source: CheckpointSource,
    selected: frozenset[str],
    device: torch.device,
    *,
    residual: bool | None = None,
    current: Callable[[str], Tensor | None] = lambda _: None,
) -> Measured:
    """Return the quantization errors of the recipe's base model and the rotations that they favour.

    Args:
        recipe: with a qat section.
        source: the checkpoint of ``recipe.model``.
        selected: module paths of the linears that are trained, on the grid of ``qat.weights``.
        device: where to measure.
        residual: R1, where it is decided already.
        current: parameter name -> its trained value in the basis of the checkpoint, or None for the checkpoint's.

    Raises:
        RecipeError: there is no qat section, or no data.
        ModelError: a width has no such rotation, or the family is not known.
        DataError: there is nothing to calibrate on.
    """
    qat = recipe.qat
    if qat is None:
        raise RecipeError("without a qat section nothing is quantized, so there is nothing to rotate for; add one")
    if recipe.data.train is None:
        raise RecipeError("data.train is required: quantization errors are measured on its samples")
    arch = arch_of(source.config)
    available = _available(recipe, source, arch)
    samples = load_samples(recipe.data, load_tokenizer(source), "train").samples
    calibration = calibration_of(samples, tokens=qat.calibration_tokens, seed=recipe.train.seed)
    layers = measure_rotations(
        LayerwiseModel(source, arch, device=device, attention=recipe.model.attention, current=current),
        arch,
        calibration.inputs(),
        calibration.real,
        _grids(recipe, selected, source.config),
        available,
        rotation=rotation_kind(qat.rotation) if qat.rotation != "none" else "hadamard",
        seed=qat.rotation_seed,
    )
    return Measured(layers=layers, available=available, choice=choose(layers, available, residual=residual))


def input_quantizer(qat: QatSection) -> nn.Module | None:
    """Return the fake quantizer of the inputs of linear layers, or None for 16 bits."""
    grid = qat.activations
    if grid is None:
        return None
    if grid.function == "compressed-tensors":
        return CompressedTensorsTokens(bits=grid.bits)
    return TokenQuantizer(**grid.model_dump(exclude={"function"}))


def cache_quantizer(qat: QatSection, config: PretrainedConfig) -> KVQuantizer | None:
    """Return the fake quantizer of keys and values, or None for 16 bits.

    Raises:
        RecipeError: the function does not exist for this head dimension.
    """
    grid = qat.kv_cache
    if grid is None:
        return None
    try:
        if grid.function == "roste":
            return RosteKV(bits=grid.bits, clip=grid.clip)
        return VllmKV(head_dim=arch_of(config).head_dim)
    except ValueError as error:
        raise RecipeError(f"qat.kv_cache: {error}") from error


def _rotated_of_run(recipe: Recipe) -> RotatedSection | None:
    """Return what the run that is continued has chosen, or None."""
    folder = Path(recipe.train.output)
    if not recipe.train.resume or not (folder / RUN_RECIPE).is_file():
        return None
    saved = load_recipe(folder)
    if saved.qat is None:
        return None
    # Written when the run began; what was chosen since is in the checkpoint that it goes on from.
    if saved.qat.reselect_every is not None and (checkpoint := latest_checkpoint(folder)) is not None:
        saved = with_rotations_of(saved, read_checkpoint(checkpoint))
    assert saved.qat is not None
    return saved.qat.rotated


def with_rotations_of(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """Return the recipe with the rotations that were in use when the checkpoint was written."""
    if recipe.qat is None or recipe.qat.reselect_every is None:
        return recipe
    rotated = RotatedSection.model_validate(checkpoint.state["recipe"]["qat"]["rotated"])
    return recipe.model_copy(update={"qat": recipe.qat.model_copy(update={"rotated": rotated})})


def _everything(recipe: Recipe, source: CheckpointSource) -> Choice:
    arch = arch_of(source.config)
    available = _available(recipe, source, arch)
    # A family whose residual stream cannot be rotated is refused when R1 is folded in, with the reason.
    return Choice.of_layers(arch.num_layers, **{**available.layers(), "residual": True})


def _available(recipe: Recipe, source: CheckpointSource, arch: Arch) -> Choice:
    assert recipe.qat is not None
    attention, code = recipe.model.attention, recipe.model.trust_remote_code
    linears = block_linears(
        empty_model(source.config, dtype=torch.float32, attention=attention, trust_remote_code=code)
    )
    kv_cache = recipe.qat.kv_cache
    return available_rotations(
        arch,
        recipe.qat.target,
        activations=recipe.qat.activations is not None,
        cached_keys=kv_cache is not None and kv_cache.function != "vllm",
        biased_down=any(linears[down].bias is not None for _, down in arch.up_downs()),
    )


def _grids(recipe: Recipe, selected: frozenset[str], config: PretrainedConfig) -> Grids:
    assert recipe.qat is not None
    dtype = getattr(torch, recipe.model.dtype)
    trained = build_quantizer(recipe.qat.weights, scale_dtype=dtype)
    of_bitsandbytes = {kind: book() for kind, book in CODE_BOOKS.items()} | {"int8": Affine(bits=8, group_size=None)}
    frozen: nn.Module | None = of_bitsandbytes.get(recipe.model.storage, frozen_quantizer(recipe.model, recipe.qat))
    return Grids(
        weights=lambda name: trained if name in selected else frozen,
        inputs=input_quantizer(recipe.qat),
        reads_integers=lambda name: name in selected or recipe.model.storage in GRID_STORAGES,
        cache=cache_quantizer(recipe.qat, config),
    )
