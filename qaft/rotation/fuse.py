"""R1 and R2 folded into the weights of a whole model, one tensor at a time.

R1 [hidden, hidden] rotates the residual stream, R2 [head_dim, head_dim] each value head of a layer. With row vectors,
y = x W^T, and gamma the weight of the norm that a linear reads:

    embedding         E  -> E R1
    q, k, gate, up    W  -> W diag(gamma) R1                                    b unchanged
    v                 W  -> (I (x) R2^T) W diag(gamma) R1                       b -> b (I (x) R2)
    o                 W  -> R1^T W (I (x) R2)                                   b -> b R1
    down              W  -> R1^T W                                              b -> b R1
    lm_head           W  -> W diag(gamma_f) R1    (tied: W is the embedding)
    norms             gamma -> 1

The model computes the same function: rms(x R1) = rms(x), so an RMSNorm without weight commutes with R1, and attention
mixes value vectors of one head, so R2 passes from v to o (grouped query heads share the R2 of their value head). The
embedding is not centred: an RMSNorm subtracts no mean, and centring would change the function.

Source: QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406 (R1, R2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qaft.arch.base import Arch
from qaft.errors import ModelError
from qaft.rotation.places import Place, places_of


class Fusion:
    """R1 (residual stream) and R2 (per head, v -> o) folded into the weights; norms folded into their readers.

    A fused model has norms of one and its own lm_head. With ``rotation="none"`` nothing is changed, norms included.

    Args:
        arch: names and sizes of the model.
        rotation: a key of ``ROTATIONS``.
        seed: R1 and the R2 of every layer derive their own seeds from it.

    Attributes:
        norm_names: parameter names of the norm weights; they must be read before the first ``forward``.

    Raises:
        ModelError: the hidden size or the head dimension has no such rotation, or the norms cannot be folded.
        RecipeError: the rotation is not known.
    """

    def __init__(self, arch: Arch, *, rotation: str = "hadamard", seed: int = 0) -> None:
        self.arch = arch
        self.rotation = rotation
        self.seed = seed
        self._places = places_of(arch, rotation=rotation, seed=seed)
        readers = arch.readers() if self._places else ()
        self.norm_names: tuple[str, ...] = tuple(f"{norm}.weight" for norm, _ in readers)

    def __repr__(self) -> str:
        return f"Fusion({self.arch.family.model_type}, rotation={self.rotation!r}, seed={self.seed})"

    def metadata(self) -> dict[str, str | int]:
        """Return the JSON-able keyword arguments that rebuild this object: ``Fusion(arch, **metadata)``."""
        return {"rotation": self.rotation, "seed": self.seed}

    def untied(self) -> bool:
        """Return whether the fused model needs its own lm_head: the embedding must not get the final norm's gamma."""
        return bool(self._places)

    def forward(self, name: str, tensor: Tensor, norms: Mapping[str, Tensor]) -> Tensor:
        """Return the parameter in the fused basis, a new fp32 tensor of the same shape, computed in fp64.

        Args:
            name: parameter name; for a tied model pass the embedding under the name of lm_head too.
            tensor: the original parameter, any floating dtype and device.
            norms: parameter name -> original weight, for every name in ``norm_names``.

        Raises:
            ModelError: as ``check``, or a norm is missing.
        """
        self.check(name, tensor)
        if name in self.norm_names:
            return torch.ones_like(tensor, dtype=torch.float32)
        place, kind = self._place(name)
        if place is None:
            return tensor.to(torch.float32, copy=True)
        if kind == "bias":
            return place.fuse_bias(tensor)
        return place.fuse(tensor, _gamma(place, norms, tensor))

    def inverse(self, name: str, tensor: Tensor, norms: Mapping[str, Tensor]) -> Tensor:
        """Return a parameter of the fused basis in the original one, a new fp32 tensor of the same shape.

        Undoing a norm divides by gamma: the rounding of the fused weight grows by rms(gamma) / |gamma_j| in column j.
        The lm_head of a tied model comes back as the embedding, if it was not trained.

        Raises:
            ModelError: as ``check``; a norm is missing or holds a zero; or a norm weight was trained in the fused basis
                (it is no longer one, which has no counterpart in the original basis).
        """
        self.check(name, tensor)
        if name in self.norm_names:
            return self._original_norm(name, tensor, norms)
        place, kind = self._place(name)
        if place is None:
            return tensor.to(torch.float32, copy=True)
        if kind == "bias":
            return place.restore_bias(tensor)
        gamma = _gamma(place, norms, tensor)
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

    def _place(self, name: str) -> tuple[Place | None, str]:
        """Return where a parameter belongs and "weight" or "bias"; no place for norms and for what is left alone."""
        if not self._places or name in self.norm_names or name in self.arch.untouched():
            return None, ""
        module, _, kind = name.rpartition(".")
        if module not in self._places or kind not in ("weight", "bias"):
            raise ModelError(
                f"{name} is not a parameter of the family {self.arch.family.model_type!r}: it would stay in the wrong "
                f"basis; set qat.rotation to none"
            )
        return self._places[module], kind

    def _original_norm(self, name: str, tensor: Tensor, norms: Mapping[str, Tensor]) -> Tensor:
        if not bool((tensor == 1).all()):
            raise ModelError(f"{name} was trained in the fused basis and has no counterpart in the original: freeze it")
        return _read(name, norms).to(tensor.device, torch.float32, copy=True)


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
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(fusion.forward(name, parameter, norms))


def _untie(model: nn.Module, arch: Arch) -> None:
    """Give lm_head its own copy of a weight that it shares with the embedding."""
    embedding = model.get_parameter(f"{arch.family.embedding}.weight")
    if model.get_parameter(f"{arch.family.lm_head}.weight") is embedding:
        own = nn.Parameter(embedding.detach().clone(), requires_grad=embedding.requires_grad)
        model.get_submodule(arch.family.lm_head).register_parameter("weight", own)
    config: Any = model.config
    config.tie_word_embeddings = False


def _read(name: str, norms: Mapping[str, Tensor]) -> Tensor:
    if name not in norms:
        raise ModelError(f"{name} must be read before the weights that it is folded into (see Fusion.norm_names)")
    return norms[name]


def _gamma(place: Place, norms: Mapping[str, Tensor], like: Tensor) -> Tensor | None:
    return None if place.norm is None else _read(place.norm, norms).to(like.device, torch.float64)
