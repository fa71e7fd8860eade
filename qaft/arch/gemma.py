"""Gemma: Llama's layout with norms of weight 1 + gamma and a scaled embedding (a scale commutes with rotations)."""

from __future__ import annotations

from dataclasses import replace

from qaft.arch.llama import LLAMA

GEMMA = replace(LLAMA, model_type="gemma", norm="rms_plus_one", untouched=())
