"""Runs with quantized activations: the file holds their weights, is compared without, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_export import INFO, prompts, section, trained

from qaft.arch import arch_of
from qaft.evaluate.float32 import float_logits
from qaft.export import EXPORTERS
from qaft.export.activations import activation_notes
from qaft.layers.activations import plain_activations
from qaft.models.load import LoadedModel
from qaft.models.online import put_online
from qaft.quant import KVQuantizer, RosteKV, TokenQuantizer, VllmKV
from qaft.sections import GridSection, QatSection

QAT = QatSection(weights=GridSection(bits=4, group_size=32))


def quantized(path: Path, *, inputs: TokenQuantizer | None, cache: KVQuantizer | None) -> LoadedModel:
    loaded = trained(path, qat=QAT)
    put_online(loaded.model, arch_of(loaded.source.config), None, inputs=inputs, cache=cache)
    return loaded


def test_a_merged_export_is_verified_with_plain_activations_and_tells_how_to_serve_it(
    checkpoint: Any, tmp_path: Path
) -> None:
    head_dim = arch_of(trained(checkpoint()).source.config).head_dim
    loaded = quantized(checkpoint(), inputs=TokenQuantizer(bits=4), cache=VllmKV(head_dim=head_dim))
    before = float_logits(loaded.model, prompts())
    report = EXPORTERS["merged"](loaded, section("merged", verify=True), tmp_path / "out", INFO)
    assert report.difference is not None and report.difference.max_relative <= 1e-5
    serve, cache, measured = report.notes
    assert "in 16 bits" in measured
    assert "TokenQuantizer(bits=4, symmetric=True" in serve and "--kv-cache-dtype int4_per_token_head" in cache
    assert all(torch.equal(a, b) for a, b in zip(before, float_logits(loaded.model, prompts()), strict=True))


def test_plain_activations_are_those_of_the_same_model_without_quantizers(checkpoint: Any) -> None:
    plain = float_logits(trained(checkpoint(), qat=QAT).model, prompts())
    loaded = quantized(checkpoint(), inputs=TokenQuantizer(bits=8), cache=RosteKV(bits=4))
    assert not torch.equal(float_logits(loaded.model, prompts())[0], plain[0])
    with plain_activations(loaded.model):
        assert all(torch.equal(a, b) for a, b in zip(plain, float_logits(loaded.model, prompts()), strict=True))
    assert len(activation_notes(loaded.model)) == 2 and "no server" in activation_notes(loaded.model)[1]


def test_a_run_with_plain_activations_has_no_notes(checkpoint: Any) -> None:
    assert activation_notes(trained(checkpoint(), qat=QAT).model) == ()
