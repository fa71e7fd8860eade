"""A language model of two adapted layers in two blocks, and its loss with and without terms over passes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qaft.bases.base import LinearSpec
from qaft.bases.dense import DenseBase
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import adapted_layers
from qaft.quant.affine import Affine
from qaft.regularizers.base import PassTerm
from qaft.train.loss import CausalLoss
from qaft.train.regularized import RegularizedLoss
from qaft.updates import UPDATES

HIDDEN, VOCABULARY = 16, 24


def adapted(name: str, seed: int, kind: str, quantized: bool, dtype: torch.dtype) -> AdaptedLinear:
    generator = torch.Generator().manual_seed(seed)
    spec = LinearSpec(name=name, out_features=HIDDEN, in_features=HIDDEN, dtype=dtype)
    weight = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=dtype) / 4
    quantizer = Affine(bits=4, group_size=8) if quantized else None
    return AdaptedLinear(DenseBase(weight), UPDATES[kind](spec), quantizer=quantizer)


class Decoder(nn.Module):
    def __init__(self, kind: str, quantized: bool, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN, dtype=dtype).requires_grad_(False)
        names = ("layers.0.proj", "layers.1.proj")
        layers = [adapted(name, i, kind, quantized, dtype) for i, name in enumerate(names)]
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": layer}) for layer in layers)
        self.dropout = nn.Dropout(dropout)
        self.passes = 0
        self.rows: list[int] = []

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        self.passes += 1
        self.rows.append(len(input_ids))
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + self.dropout(torch.tanh(layer["proj"](x)))
        return SimpleNamespace(last_hidden_state=x)


class Model(nn.Module):
    def __init__(
        self,
        kind: str = "lowrank",
        *,
        quantized: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        trained: bool = True,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = Decoder(kind, quantized, dropout, dtype)
            self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
            if trained:
                for layer in adapted_layers(self).values():
                    for parameter in layer.update.parameters():
                        parameter.data += 0.1 * torch.randn_like(parameter)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def batch(rows: int = 4, length: int = 5) -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    labels[:, :2] = -100
    labels[0, 2] = -100
    return {"input_ids": tokens, "labels": labels}


def regularized(model: Model, terms: Sequence[PassTerm]) -> RegularizedLoss:
    layers = adapted_layers(model)
    for term in terms:
        term.prepare(layers)
    return RegularizedLoss(CausalLoss(model), terms, layers)


def logits(model: Model, rows: int = 4) -> Tensor:
    """Logits at the targets of the batch, [N, V]."""
    loss, given = CausalLoss(model), batch(rows)
    return model.lm_head(loss.at_targets(**given)[0])
