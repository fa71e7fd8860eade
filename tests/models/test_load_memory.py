"""The peak of host memory while a model is loaded, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 1024, 2816, 8, 512

MEASURE = """
import json, re, sys
import torch
from qaft.bases.bnb import FourBitBase
from qaft.models.load import load_model
from qaft.sections import ModelSection

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
FourBitBase.from_weight(torch.randn(64, 64), None, dtype=torch.bfloat16)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
before = status("VmRSS")
model = load_model(ModelSection(name=sys.argv[1], storage=sys.argv[2]), qat=None).model
size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
print(json.dumps({"size": size, "peak": status("VmHWM") - before, "after": status("VmRSS") - before}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[[Path], None]) -> Path:
    """A bf16 Llama of 200 MB, one shard per layer."""
    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        vocab_size=VOCAB,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    write_tokenizer(folder)
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN)}
    shapes |= {"mlp.down_proj": (HIDDEN, INTERMEDIATE), "input_layernorm": (HIDDEN,)}
    shapes |= {"post_attention_layernorm": (HIDDEN,)}
    layer = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    shards = [{f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()} for i in range(LAYERS)]
    rest = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    shards.append({f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16) for name, shape in rest.items()})
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(shard, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the memory counters of Linux")
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_peak_is_the_packed_model_a_shard_and_a_layer(checkpoint: Path, storage: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(checkpoint), storage]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "PermissionError" in result.stderr:
        pytest.skip("this system does not let a process reset its memory counters")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    dense = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    shard = max(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    largest_tensor = 4 * HIDDEN * INTERMEDIATE
    bound = measured["size"] + shard + 2 * largest_tensor
    assert bound < 0.85 * dense  # otherwise the bound would prove nothing
    assert measured["peak"] <= bound
    assert measured["after"] <= measured["size"] + shard
