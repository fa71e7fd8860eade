"""``qat.reselect_every: K``: the lower-level problem is solved again every K steps, with the weights of that moment.

RoSTE alternates between choosing rotations (from the weights) and T steps of training (through the quantizer);
published runs choose once. Here R2, R3 and R4 of every layer are chosen anew; R1 stays as it began: it is one choice
for all of the model, and embedding, norms and head are folded into it.

When a rotation changes, what is frozen is read from the checkpoint again and rounded in the new basis; a trained weight
is its base, treated likewise, plus its delta, which is turned together with the optimizer's moments (``turn.py``).
So the bases follow from checkpoint and choice alone: a continued run rebuilds them from the choice in its checkpoint.

Source: RoSTE, arXiv 2502.09003, algorithm 1 (K > 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qaft.arch import arch_of
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import replace_module
from qaft.layers.inputs import LayerInput, input_of, put_before
from qaft.models.attention import attention_inputs
from qaft.models.layers import LayerBuilder
from qaft.models.load import LoadedModel
from qaft.recipe import Recipe
from qaft.rotation.choice import Choice
from qaft.rotation.fuse import Fusion
from qaft.rotation.place import Place
from qaft.rotation.places import attention_rotation, down_rotation
from qaft.rotation.turn import turn, turn_second_moment
from qaft.rotations import measure
from qaft.sections import RotatedSection
from qaft.updates.dense import DenseDelta

_LINEAR_STATE = ("exp_avg", "momentum_buffer")
_SECOND_MOMENTS = ("exp_avg_sq",)


class Reselection:
    """Chooses the rotations of a run that is being trained again, and turns the run into the new choice.

    Args:
        recipe: of the run, with ``qat.reselect_every`` and ``qat.rotated``.
        loaded: its model; changed in place.
        layers: name -> trained layer, with dense updates.
        optimizer: adamw or sgd over their parameters.
        device: of the model.

    Attributes:
        recipe: as given, with the rotations that are in use now.
    """

    def __init__(
        self,
        recipe: Recipe,
        loaded: LoadedModel,
        layers: Mapping[str, AdaptedLinear],
        optimizer: Optimizer,
        device: torch.device,
    ) -> None:
        assert recipe.qat is not None and loaded.fusion is not None
        self.recipe = recipe
        self._loaded = loaded
        self._layers = layers
        self._optimizer = optimizer
        self._device = device
        self._arch = arch_of(loaded.source.config)
        chosen: Any = layers.__contains__
        self._builder = LayerBuilder(recipe.model, recipe.qat, latent=chosen, adapted=chosen, seed=recipe.train.seed)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Choose with the weights as they are, change what has to be changed, and return counts for the log."""
        fusion = self._fusion
        measured = measure(
            self.recipe,
            self._loaded.source,
            frozenset(self._layers),
            self._device,
            residual=fusion.choice.residual,
            current=self._trained_weight,
        )
        changed = self.turn_to(measured.choice)
        used = measured.choice.layers()
        counts = {kind: float(len(used[kind])) for kind in ("values", "attention", "down")}
        return {"rotations/changed": float(changed)} | {f"rotations/{kind}": n for kind, n in counts.items()}

    @torch.no_grad()
    def turn_to(self, choice: Choice) -> int:
        """Bring model, updates and optimizer state into the bases of ``choice``; return how many rotations changed.

        Raises:
            ValueError: R1 differs.
        """
        old = self._fusion
        if choice.residual != old.choice.residual:
            raise ValueError("R1 cannot change during a run: the embedding, every norm and the head are folded into it")
        new = Fusion(self._arch, choice, rotation=old.rotation, seed=old.seed)
        touched = [
            *self._changed(self._arch.value_outputs(), old.choice.values, choice.values),
            *self._changed(self._arch.up_downs(), old.choice.down, choice.down),
        ]
        for pair in touched:
            for name in pair:
                before, after = old.places.get(name, Place()), new.places.get(name, Place())
                self._rebuild(name, new)
                if name in self._layers:
                    self._turn_update(self._layers[name], before, after)
        self._put_down(choice)
        num_keys = self._put_attention(choice)
        self._loaded.fusion = new
        assert self.recipe.qat is not None
        rotated = RotatedSection.model_validate(choice.layers())
        self.recipe = self.recipe.model_copy(update={"qat": self.recipe.qat.model_copy(update={"rotated": rotated})})
        return len(touched) + num_keys

    @property
    def _fusion(self) -> Fusion:
        assert self._loaded.fusion is not None
        return self._loaded.fusion

    def _trained_weight(self, name: str) -> Tensor | None:
        """Return the latent of a trained weight in the basis of the checkpoint, fp32; None for other parameters."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self._layers:
            return None
        return self._fusion.inverse(name, self._layers[module].latent(), self._loaded.originals)

    @staticmethod
    def _changed(
        pairs: tuple[tuple[str, str], ...], before: tuple[bool, ...], after: tuple[bool, ...]
    ) -> list[tuple[str, str]]:
        return [pair for pair, was, is_now in zip(pairs, before, after, strict=True) if was != is_now]

    def _rebuild(self, name: str, fusion: Fusion) -> None:
        """Give a linear its frozen part in the basis of ``fusion``, from the checkpoint, as loading does."""
        originals = self._loaded.originals
        layer = self._loaded.model.get_submodule(name)
        weight, bias = (
            fusion.forward(key, originals[key].to(self._device), originals) if key in originals else None
            for key in (f"{name}.weight", f"{name}.bias")
        )
        assert weight is not None
        base = self._builder.build(name, weight, bias).to(self._device)
        if isinstance(layer, AdaptedLinear):
            layer.base = base
            return
        inputs = input_of(layer)
        if inputs is not None:
            put_before(base, inputs)
        replace_module(self._loaded.model, name, base)

    def _turn_update(self, layer: AdaptedLinear, old: Place, new: Place) -> None:
        update = layer.update
        assert isinstance(update, DenseDelta)
        update.delta.copy_(turn(update.delta, old, new))
        state = self._optimizer.state.get(update.delta, {})
        for key in _LINEAR_STATE:
            if isinstance(state.get(key), Tensor):
                state[key].copy_(turn(state[key], old, new))
        for key in _SECOND_MOMENTS:
            if isinstance(state.get(key), Tensor):
                state[key].copy_(turn_second_moment(state[key], old, new))

    def _put_down(self, choice: Choice) -> None:
        """Put the online half of R4 before the downs that have it now, and take it from the others."""
        rotation = down_rotation(self._arch, rotation=self._fusion.rotation) if any(choice.down) else None
        for (_, name), used in zip(self._arch.up_downs(), choice.down, strict=True):
            layer = self._loaded.model.get_submodule(name)
            inputs = input_of(layer)
            wanted = rotation if used else None
            if inputs is not None and (inputs.rotation is None) != (wanted is None):
                inputs.rotation = wanted
            elif inputs is None and wanted is not None:
                put_before(layer, LayerInput(rotation=wanted))

    def _put_attention(self, choice: Choice) -> int:
        """Put R3 on queries and keys of the layers that have it now, take it from the others; return the changes."""
        rotation = attention_rotation(self._arch, rotation=self._fusion.rotation) if any(choice.attention) else None
        changes = 0
        for name, used in zip(self._arch.attentions(), choice.attention, strict=True):
            inputs = attention_inputs(self._loaded.model.get_submodule(name))
            if inputs is None or (inputs.rotation is not None) == used:
                continue
            inputs.rotation = rotation if used else None  # pyright: ignore[reportArgumentType]
            changes += 1
        return changes
