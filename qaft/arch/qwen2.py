"""Qwen2 and Qwen2.5: Llama's layout with biases on query, key and value."""

from __future__ import annotations

from dataclasses import replace

from qaft.arch.llama import LLAMA

QWEN2 = replace(LLAMA, model_type="qwen2")
