"""Trained models on top of tiny checkpoints: what ``qaft.build`` makes, without data and training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qaft.bases.base import LinearSpec
from qaft.evaluate.float32 import float_logits
from qaft.export.base import ExportInfo
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import attach
from qaft.models.load import LoadedModel, linear_names, load_model
from qaft.quant import build_quantizer
from qaft.rotation.choice import Choice
from qaft.sections import ExportSection, ModelSection, QatSection
from qaft.updates import UPDATES
from qaft.updates.bank import Bank
from qaft.updates.roco import RoCo

UPDATE_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "lowrank": ("lowrank", {"rank": 3, "alpha": 12.0}),
    "rows": ("roco", {"rows": 4}),
    "columns": ("roco", {"columns": 3}),
    "both": ("roco", {"rows": 2, "columns": 3}),
    "linchain": ("linchain", {"rank": 3, "depth": 2}),
    "bank": ("bank", {"rank": 1, "blocks": 3}),
    "sift": ("sift", {"rate": 0.02, "choose": "random"}),
}
INFO = ExportInfo(
    recipe={"model": {"name": "tiny"}}, base="org/tiny", command="qaft export runs/x", metrics={"loss": 1.5}
)


def trained(
    checkpoint: Path,
    update: str = "lowrank",
    *,
    qat: QatSection | None = None,
    storage: str = "bf16",
    dtype: str = "bfloat16",
    select: Callable[[str], bool] = lambda name: True,
    size: float = 0.05,
    choice: Choice | None = None,
    **model: Any,
) -> LoadedModel:
    """The checkpoint with random updates of ``size`` relative to the weights in the selected layers."""
    from qaft.models.source import open_source

    names = [n for n in linear_names(open_source(str(checkpoint)).config) if select(n)]
    chosen = frozenset(names)
    loaded = load_model(
        ModelSection(name=str(checkpoint), storage=storage, dtype=dtype, **model),
        qat=qat,
        choice=choice,
        latent=lambda name: qat is not None and name in chosen,
        adapted=lambda name: name in chosen,
    )
    quantizer = None if qat is None else build_quantizer(qat.weights, scale_dtype=getattr(torch, dtype))
    kind, options = UPDATE_OPTIONS[update]

    def adapt(name: str, base: Any) -> AdaptedLinear:
        spec = LinearSpec(name=name, out_features=base.out_features, in_features=base.in_features)
        return AdaptedLinear(base, UPDATES[kind](spec, **options), quantizer=quantizer)

    for layer in attach(loaded.model, names, adapt).values():
        move(layer, size)
    return loaded


@torch.no_grad()
def move(layer: AdaptedLinear, size: float) -> None:
    generator = torch.Generator().manual_seed(layer.in_features)
    for parameter in layer.update.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    base = layer.base.dequantize().float()
    change = (layer.update.merge(base) - base).norm()
    # Low-rank updates are products: scaling one factor scales the update.
    last = (
        list(layer.update.parameters())
        if isinstance(layer.update, (Bank, RoCo))
        else [list(layer.update.parameters())[-1]]
    )
    for parameter in last:
        parameter.mul_(size * base.norm() / change)


def section(format: str, *, verify: bool = False, **options: Any) -> ExportSection:
    return ExportSection(format=format, verify=verify, **options)


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (length,), generator=generator) for length in (7, 12)]


def reloaded(folder: Path) -> Any:
    """What a user gets; every tensor must have found its place."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64))
    return model


def relative_difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(float_logits(a, prompts()), float_logits(b, prompts()), strict=True)
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)
