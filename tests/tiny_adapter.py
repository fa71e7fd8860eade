"""LoRA folders as users bring them: made, scaled and saved by PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "v_proj", "down_proj"]


def peft_model(base: Path, *, size: float = 0.1, **options: Any) -> Any:
    """The base in fp32 with adapters whose B is random with standard deviation ``size``."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                torch.nn.init.normal_(parameter, std=size)
    return adapted.eval()


def save_adapter(base: Path, folder: Path, *, size: float = 0.1, **options: Any) -> Path:
    """The folder of such an adapter."""
    peft_model(base, size=size, **options).save_pretrained(folder, save_embedding_layers=False)
    return folder
