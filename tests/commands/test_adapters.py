"""Adapters as a model's name: on a base in a ``.gguf`` file, and of PEFT alone, with factors in 16 bits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_checkpoint import write_checkpoint
from tiny_job import job, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from qaft.commands.diff import diff_models
from qaft.commands.open import open_model
from qaft.evaluate.float32 import float_logits

# PEFT 0.21 asks models of transformers 5.23 by their old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS = (torch.arange(3, 20),)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=192)


@pytest.fixture(scope="module")
def on_gguf(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on a ``.gguf`` file, and its adapter."""
    folder = tmp_path_factory.mktemp("gguf")
    small = {"train": {"steps": 2}, "optim": {"lr": 1e-2}, "select": {"targets": ["q_proj", "v_proj"]}}
    qat = {"weights": {"kind": "q4_0"}}
    model = {"storage": "int4", "dtype": "bfloat16"}
    made = train(job(checkpoint, folder, model=model, qat=qat, export=[{"format": "gguf", "verify": False}], **small))
    file = made.folder / "export-gguf" / "model.gguf"
    other = folder / "on-it"
    other.mkdir()
    update = {"kind": "lowrank", "rank": 4}
    model = {"name": str(file), "storage": "bf16", "dtype": "bfloat16"}
    run = train(job(file, other, model=model, update=update, export=[{"format": "peft"}], **small)).folder
    return run, run / "export-peft"


def test_an_adapter_on_a_gguf_file_is_the_run(on_gguf: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, adapter = on_gguf
    diff_models(str(run), str(adapter), prompts=None, gate=1e-5)
    assert "max relative logit difference" in capsys.readouterr().out
    own, found = (float_logits(open_model(str(folder)).model, PROMPTS)[0] for folder in on_gguf)
    torch.testing.assert_close(found, own, atol=1e-4, rtol=1e-4)


def test_the_cards_lines_load_an_adapter_on_a_gguf_file(on_gguf: tuple[Path, Path]) -> None:
    run, adapter = on_gguf
    found = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    names: dict[str, object] = {}
    exec(found[1].replace(f'"{adapter.name}"', f'"{adapter}"'), names)
    own = float_logits(open_model(str(run)).model, PROMPTS)[0]
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    # In bf16, and transformers rounds the adapter to that.
    torch.testing.assert_close(float_logits(model, PROMPTS)[0], own, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_peft_folders_are_compared_whatever_the_dtype_of_their_factors(
    checkpoint: Path, tmp_path: Path, factors: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(factors)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "adapter")
    merged = model.float().merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "merged")
    # Transformers rounds fp32 factors to the dtype of the base.
    gate = 1e-5 if factors == torch.bfloat16 else 1e-1
    diff_models(str(tmp_path / "merged"), str(tmp_path / "adapter"), prompts=None, gate=gate)
    assert "relative" in capsys.readouterr().out
