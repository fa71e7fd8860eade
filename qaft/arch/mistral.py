"""Mistral 7B and its dense successors: Llama's layout (the sliding window does not concern the weights)."""

from __future__ import annotations

from dataclasses import replace

from qaft.arch.llama import LLAMA

MISTRAL = replace(LLAMA, model_type="mistral")
