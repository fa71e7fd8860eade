"""The quickstart's model, its first blocks: an adapter that real PEFT loads on the original base is the trained run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_job import job, train
from transformers import AutoModelForCausalLM

from qaft.build import Run
from qaft.errors import ModelError
from qaft.evaluate.difference import PromptLogits, compare_logits, logits_of, prompt_ids
from qaft.models.source import open_source
from qaft.quickstart.__main__ import model_file
from qaft.tensor_file import save_tensors

BLOCKS = 3
EXACT = 1e-5
"""Relative logit difference of equal weights whose fp32 sums are formed in another order."""

pytestmark = [
    pytest.mark.smollm2,
    # PEFT 0.21 asks models of transformers 5.23 by their old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def first_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of SmolLM2-135M-Instruct without all but its first blocks, in fp32."""
    try:
        file = model_file()
    except ModelError as error:
        pytest.skip(str(error))
    # The conversion to bf16 is the one that the quickstart keeps.
    source = open_source(str(file), dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": BLOCKS, "dtype": "float32"}))
    dropped = tuple(f"model.layers.{i}." for i in range(BLOCKS, config["num_hidden_layers"]))
    kept = {name: source.read(name).float() for name in source.names() if not name.startswith(dropped)}
    save_tensors(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(first_blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two steps of LoRA on the queries and values, exported as an adapter and merged, both unverified."""
    folder = tmp_path_factory.mktemp("run")
    yield train(
        job(
            first_blocks,
            folder,
            update={"kind": "lowrank", "rank": 8, "alpha": 16},
            optim={"lr": 1e-2},
            data={"valid": None},
            train={"steps": 2},
            export=[{"format": name, "verify": False} for name in ("peft", "merged")],
        )
    )
    shutil.rmtree(folder)


def distance(run: Run, other: torch.nn.Module) -> float:
    ids = prompt_ids(run.loaded.tokenizer)
    reference: PromptLogits = logits_of(run.loaded.model, ids)
    return compare_logits(reference, logits_of(other, ids)).max_relative


def test_peft_on_the_original_base_computes_the_function_that_was_trained(first_blocks: Path, run: Run) -> None:
    base = AutoModelForCausalLM.from_pretrained(first_blocks).eval()
    assert distance(run, base) > 100 * EXACT
    assert distance(run, peft.PeftModel.from_pretrained(base, run.folder / "export-peft").eval()) <= EXACT


def test_the_merged_export_differs_from_the_base_in_q_and_v_alone(first_blocks: Path, run: Run) -> None:
    before = load_file(first_blocks / "model.safetensors")
    after = load_file(run.folder / "export-merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    projections = ("q_proj", "v_proj")
    assert changed == {f"model.layers.{i}.self_attn.{name}.weight" for i in range(BLOCKS) for name in projections}
    assert distance(run, AutoModelForCausalLM.from_pretrained(run.folder / "export-merged").eval()) <= EXACT
