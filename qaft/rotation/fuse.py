"""The rotations of a model folded into its weights, one tensor at a time.

R1 [hidden, hidden] rotates the residual stream, R2 [head_dim, head_dim] each value head of a layer, R4 = D B the input
of down. With row vectors, y = x W^T, and gamma, beta the parameters of the norm that a linear reads:

    embedding         E  -> E R1
    q, k, gate        W  -> W diag(gamma) R1                                    b -> b + W beta
    up                W  -> D W diag(gamma) R1                                  b -> (b + W beta) D
    v                 W  -> (I (x) R2^T) W diag(gamma) R1                       b -> (b + W beta) (I (x) R2)
    o                 W  -> R1^T W (I (x) R2)                                   b -> b R1
    down              W  -> R1^T W D B                                          b -> b R1
    lm_head           W  -> W diag(gamma_f) R1    (tied: W is the embedding)
    norms             gamma -> 1,  beta -> 0, or (beta / gamma) R1 where a reader has no bias to take it up

The model computes the same function: rms(x R1) = rms(x), so an RMSNorm without weight commutes with R1, and attention
mixes value vectors of one head, so R2 passes from v to o (grouped query heads share the R2 of their value head). An
RMSNorm subtracts no mean, so the embedding is not centred: that would change the function. A LayerNorm does, so there
R1 keeps the mean (``MeanPreserving``), and what it subtracts anyway is taken out of all that writes the stream.

Source: QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406 (R1, R2, R4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qaft.arch.base import Arch
from qaft.errors import ModelError
from qaft.rotation.choice import Choice
from qaft.rotation.place import Place
from qaft.rotation.places import places_of


class Fusion:
    """The chosen rotations folded into the weights, and the norms into their readers where R1 is among them.

    A model with R1 has norms of weight one and its own lm_head. Without a rotation nothing is changed.

    Args:
        arch: names and sizes of the model.
        choice: which rotations; default: R1 and every R2. What is online is not applied here, only its fused part.
        rotation: a key of ``ROTATIONS``.
        seed: every rotation derives its own seed from it.

    Attributes:
        places: module name -> how its weight changes.
        norm_names: parameter names of the norms that are folded; they must be read before the first ``forward``.

    Raises:
        ModelError: a width has no such rotation, or the residual stream cannot be rotated.
        RecipeError: the rotation is not known.
    """

    def __init__(self, arch: Arch, choice: Choice | None = None, *, rotation: str = "hadamard", seed: int = 0) -> None:
        self.arch = arch
        if choice is None:
            choice = Choice.uniform(arch.num_layers, residual=rotation != "none", values=rotation != "none")
        self.choice = choice
        self.rotation = rotation
        self.seed = seed
        self.places = places_of(arch, self.choice, rotation=rotation, seed=seed)
        self._norms = [norm for norm, _ in arch.readers()] if self.choice.residual else []
        kinds = ("weight", "bias") if arch.family.norm == "layer" else ("weight",)
        self.norm_names: tuple[str, ...] = tuple(f"{norm}.{kind}" for norm in self._norms for kind in kinds)

    def __repr__(self) -> str:
        return f"Fusion({self.arch.family.model_type}, rotation={self.rotation!r}, seed={self.seed})"

    def untied(self) -> bool:
        """Return whether the fused model needs its own lm_head: the embedding must not get the final norm's gamma."""
        return self.choice.residual

    def forward(self, name: str, tensor: Tensor, originals: Mapping[str, Tensor]) -> Tensor:
        """Return the parameter in the fused basis, a new fp32 tensor of the same shape.

        Args:
            name: parameter name; for a tied model pass the embedding under the name of lm_head too.
            tensor: the original parameter, any floating dtype and device.
            originals: parameter name -> original, for every name in ``norm_names``; for the bias of a linear that takes
                up the bias of a LayerNorm also the weight beside it.

        Raises:
            ModelError: as ``check``, or an original is missing.
        """
        self.check(name, tensor)
        if name in self.norm_names:
            return self._fused_norm(name, tensor, originals)
        place, kind = self._place(name)
        if place is None:
            return tensor.to(torch.float32, copy=True)
        if kind == "bias":
            return place.fuse_bias(tensor + self._shift(name, place, originals, tensor))
        return place.fuse(tensor, self.gamma(place, originals))

    def inverse(self, name: str, tensor: Tensor, originals: Mapping[str, Tensor]) -> Tensor:
        """Return a parameter of the fused basis in the original one, a new fp32 tensor of the same shape.

        Undoing a norm divides by gamma: the rounding of the fused weight grows by rms(gamma) / |gamma_j| in column j.
        The lm_head of a tied model comes back as the embedding, if it was not trained. The mean that a LayerNorm takes
        out of the stream does not come back: the function is that of the original all the same.

        Raises:
            ModelError: as ``check``; an original is missing; gamma holds a zero; or a norm was trained in the fused
                basis (it has no counterpart in the original basis then).
        """
        self.check(name, tensor)
        if name in self.norm_names:
            return self._original_norm(name, tensor, originals)
        place, kind = self._place(name)
        if place is None:
            return tensor.to(torch.float32, copy=True)
        if kind == "bias":
            return place.restore_bias(tensor) - self._shift(name, place, originals, tensor).float()
        gamma = self.gamma(place, originals)
        if gamma is not None and not bool(gamma.all()):
            raise ModelError(f"{place.norm} holds zeros: {name} cannot be brought back to the original basis")
        return place.restore(tensor, gamma)

    def check(self, name: str, tensor: Tensor) -> None:
        """Refuse a parameter that ``forward`` and ``inverse`` cannot treat; a meta tensor is enough.

        Raises:
            ModelError: the name is not part of the family, the shape contradicts the config, or it holds integers.
        """
        place, kind = self._place(name)
        if not tensor.is_floating_point():
            raise ModelError(
                f"{name} is stored as {tensor.dtype}: a packed weight cannot be rotated; give the 16-bit checkpoint"
            )
        if name in self.norm_names:
            needed: tuple[int | None, ...] = (self.arch.hidden_size,)
        elif place is None:
            return
        else:
            sides = (place.writes, place.reads) if kind == "weight" else (place.writes,)
            needed = tuple(None if side is None else side.width for side in sides)
        sizes = tuple(tensor.shape)
        if len(sizes) != len(needed) or any(want not in (None, size) for want, size in zip(needed, sizes, strict=True)):
            wanted = ", ".join("any" if want is None else str(want) for want in needed)
            raise ModelError(f"{name} has shape {list(sizes)}, but its config implies [{wanted}]")

    def gamma(self, place: Place, originals: Mapping[str, Tensor]) -> Tensor | None:
        """Return what the norm that this place reads multiplies its inputs by, fp64 [hidden], or None without a norm.

        Raises:
            ModelError: the norm is missing among the originals.
        """
        if place.norm is None:
            return None
        weight = _read(f"{place.norm}.weight", originals).double()
        return 1 + weight if self.arch.family.norm == "rms_plus_one" else weight

    def moves_shift(self, module: str) -> bool:
        """Return whether the bias of this linear takes up what the bias of the LayerNorm before it contributes."""
        place = self.places.get(module)
        layer_norm = self.arch.family.norm == "layer"
        return bool(place and place.norm and layer_norm and not self.arch.shift_stays(place.norm))

    def _place(self, name: str) -> tuple[Place | None, str]:
        """Return where a parameter belongs and "weight" or "bias"; no place for norms and for what is left alone."""
        if not self.places or name in self.norm_names or name in self.arch.untouched():
            return None, ""
        module, _, kind = name.rpartition(".")
        if module in self.places and kind in ("weight", "bias"):
            return self.places[module], kind
        if self.choice.residual:
            raise ModelError(
                f"{name} is not a parameter of the family {self.arch.family.model_type!r}: it would stay in the wrong "
                f"basis; set qat.rotation to none"
            )
        return None, ""

    def _shift(self, name: str, place: Place, originals: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Return ``W beta`` in fp64, what the bias of a LayerNorm adds to the bias of its reader; zero where it stays.

        Raises:
            ModelError: an original is missing.
        """
        module = name.removesuffix(".bias")
        if not self.moves_shift(module):
            return like.new_zeros((), dtype=torch.float64)
        beta = _read(f"{place.norm}.bias", originals).to(like.device, torch.float64)
        weight = _read(f"{module}.weight", originals).to(like.device)
        return torch.cat([part.double() @ beta for part in weight.split(1024)])

    def _fused_norm(self, name: str, tensor: Tensor, originals: Mapping[str, Tensor]) -> Tensor:
        norm, _, kind = name.rpartition(".")
        if kind == "weight" and self.arch.family.norm != "rms_plus_one":
            return torch.ones_like(tensor, dtype=torch.float32)
        if kind == "weight" or not self.arch.shift_stays(norm):
            return torch.zeros_like(tensor, dtype=torch.float32)
        gamma, beta = _read(f"{norm}.weight", originals).double(), tensor.double()
        if bool(((gamma == 0) & (beta != 0)).any()):
            raise ModelError(f"{norm} has zeros in its weight and a bias there, which no reader can take up")
        shift = torch.where(beta == 0, beta, beta / gamma.to(beta.device))
        r1 = self.places[self.arch.family.embedding].reads
        assert r1 is not None
        return r1.apply(shift).float()

    def _original_norm(self, name: str, tensor: Tensor, originals: Mapping[str, Tensor]) -> Tensor:
        original = _read(name, originals).to(tensor.device)
        if not torch.equal(tensor, self._fused_norm(name, original, originals).to(tensor.dtype)):
            raise ModelError(f"{name} was trained in the fused basis and has no counterpart in the original: freeze it")
        return original.to(torch.float32, copy=True)


def fuse_model(model: nn.Module, fusion: Fusion) -> None:
    """Bring a transformers model into the fused basis in place; tied embeddings are untied, dtypes are kept.

    Raises:
        ModelError: a parameter cannot be fused; the model is then as it was.
    """
    for name, parameter in model.named_parameters():
        fusion.check(name, parameter)
    if fusion.untied():
        _untie(model, fusion.arch)
    parameters = dict(model.named_parameters())
    norms = {name: parameters[name].detach().clone() for name in fusion.norm_names}
    fused_norms = {name: fusion.forward(name, norm, norms) for name, norm in norms.items()}
    # Biases first: they need the original weights beside them.
    others = sorted(parameters.keys() - norms.keys(), key=lambda name: not name.endswith(".bias"))
    with torch.no_grad():
        for name in others:
            parameters[name].copy_(fusion.forward(name, parameters[name], {**parameters, **norms}))
        for name, norm in fused_norms.items():
            parameters[name].copy_(norm)


def _untie(model: nn.Module, arch: Arch) -> None:
    """Give lm_head its own copy of a weight that it shares with the embedding."""
    embedding = model.get_parameter(f"{arch.family.embedding}.weight")
    if model.get_parameter(f"{arch.family.lm_head}.weight") is embedding:
        own = nn.Parameter(embedding.detach().clone(), requires_grad=embedding.requires_grad)
        model.get_submodule(arch.family.lm_head).register_parameter("weight", own)
    config: Any = model.config
    config.tie_word_embeddings = False


def _read(name: str, originals: Mapping[str, Tensor]) -> Tensor:
    if name not in originals:
        raise ModelError(f"{name} must be read before what it is folded into (see Fusion.norm_names)")
    return originals[name]
