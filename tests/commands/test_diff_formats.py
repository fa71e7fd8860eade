"""``qaft diff`` of a run and its export in every format: each limit is printed, and one that is exceeded is found."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_checkpoint
from tiny_job import job, train, write_job

from qaft.cli import main
from qaft.commands.diff import diff_models
from qaft.commands.open import open_model
from qaft.errors import DifferenceError, ModelError
from qaft.evaluate.float32 import float_logits
from qaft.export import EXPORTERS

# PEFT 0.21 asks models of transformers 5.23 by their old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

INT4 = {"weights": {"bits": 4, "group_size": 64}}
INT8 = {"weights": {"bits": 8, "group_size": None}}
ROWS = {"kind": "roco", "rows": 4}
RELATIVE, KL32, KL16 = "max relative logit difference", "KL in 32 bits, nats", "KL in 16 bits, nats"
FLIPS = "codes of inputs that differ, of a layer"


@dataclass(frozen=True)
class Case:
    """How a format is trained, the limits that it has, and the tensor of q_proj to harm."""

    format: str
    storage: str
    limits: tuple[str, ...]
    tensor: str
    qat: dict[str, Any] | None = None
    dtype: str = "bfloat16"
    update: dict[str, Any] = field(default_factory=lambda: {"kind": "dense"})
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "merged": Case("merged", "int4", (RELATIVE, KL16), "weight", INT4),
    "merged, original basis": Case("merged", "int4", (KL32,), "weight", INT4, options={"basis": "original"}),
    "compressed-tensors": Case("compressed-tensors", "int4", (RELATIVE, KL16), "weight_scale", INT4),
    "compressed-tensors, vllm": Case(
        "compressed-tensors",
        "int4",
        (KL32, FLIPS, KL16),
        "weight_scale",
        {**INT4, "activations": {"bits": 8}, "target": "vllm"},
        options={"profile": "vllm"},
    ),
    "bnb, nf4": Case("bnb", "nf4", (RELATIVE,), "weight.absmax", {"weights": {"kind": "nf4"}}),
    "bnb, fp4": Case("bnb", "fp4", (RELATIVE,), "weight.absmax", {"weights": {"kind": "fp4"}}),
    # Its weights are not rounded to 16 bits, as those of the run are: compared with the recorded answers.
    "bnb, int8": Case("bnb", "int8", (RELATIVE,), "SCB", INT8, options={"verify": True}),
    "gguf": Case("gguf", "int4", (RELATIVE, KL16), "weight", {"weights": {"kind": "q4_0"}}),
    "gptq": Case("gptq", "int4", (RELATIVE,), "scales", INT4, "float16"),
    "peft": Case("peft", "bf16", (RELATIVE,), "lora_B.weight", update={"kind": "lowrank", "rank": 4}),
    "peft, cut": Case("peft", "bf16", (RELATIVE,), "lora_B.weight", options={"rank": 2, "verify": True}),
    "patch": Case("patch", "int4", (RELATIVE, KL16), "weight_scale", INT4, update=ROWS),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Returns the folders of a trained run and of its export; of a patch, of the base that it is on."""
    made: dict[str, tuple[Path, Path]] = {}
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=192)

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = _exported(CASES[name], checkpoint, tmp_path_factory.mktemp("run"))
        return made[name]

    return make


def _exported(case: Case, checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    raw = job(
        checkpoint,
        folder,
        model={"storage": case.storage, "dtype": case.dtype},
        qat=case.qat,
        select={"targets": ["q_proj", "v_proj"]},
        update=case.update,
        optim={"lr": 1e-2},
        train={"steps": 2},
        export=[{"format": case.format, "verify": False, **case.options}],
    )
    run = train(raw).folder
    export = run / f"export-{case.format}"
    if case.format != "patch":
        return run, export
    base = folder / "base"
    write_job(folder / "base.yaml", {**raw, "export": []})
    assert qaft("patch", "base", folder / "base.yaml", "--out", base, "--no-verify") == 0
    assert qaft("patch", "apply", export, "--base", base) == 0
    return run, base


def qaft(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def harm(folder: Path, leaf: str) -> None:
    """Change every second value or byte of q_proj's ``leaf`` in the first block."""
    for path in folder.glob("*.gguf"):
        (tensor,) = (t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.0.attn_q.weight")
        tensor.data[::2, 7] ^= 0x88
        return
    path = folder / ("adapter_model.safetensors" if leaf.startswith("lora") else "model.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith(f"layers.0.self_attn.q_proj.{leaf}"))
    tensors[name][::2] *= 1.5
    save_file(tensors, path, metadata)


def test_every_format_has_a_case() -> None:
    assert {case.format for case in CASES.values()} == set(EXPORTERS)


@pytest.mark.parametrize("name", CASES)
def test_every_limit_of_every_format_is_printed_and_holds(
    exported: Callable[[str], tuple[Path, Path]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, export = exported(name)
    capsys.readouterr()
    assert qaft("diff", run, export) == 0
    printed = capsys.readouterr().out
    assert f"bound of {CASES[name].format}: " in printed and "no export of this run" not in printed
    assert tuple(re.findall(r"^  (.*): \S+, allowed \S+: holds$", printed, re.MULTILINE)) == CASES[name].limits
    assert "EXCEEDED" not in printed


@pytest.mark.parametrize("name", CASES)
def test_a_weight_that_is_not_the_exported_one_ends_with_its_exit_code(
    exported: Callable[[str], tuple[Path, Path]], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, export = exported(name)
    other = Path(shutil.copytree(export, tmp_path / "other"))
    harm(other, CASES[name].tensor)
    capsys.readouterr()
    assert qaft("diff", run, other) == 5
    printed = capsys.readouterr()
    assert "EXCEEDED" in printed.out and "above its limits are" in printed.err


@pytest.mark.parametrize("name", ["gguf", "gptq"])
def test_formats_that_a_client_may_lack_are_opened_as_verification_opens_them(
    exported: Callable[[str], tuple[Path, Path]], name: str
) -> None:
    run, export = exported(name)
    ids = [torch.arange(5, 17)]
    models = (open_model(str(run)).model, open_model(str(export)).model)
    ours, theirs = (float_logits(model, ids)[0] for model in models)
    assert float((ours - theirs).abs().max() / ours.abs().max()) <= 1e-5


def test_a_patch_alone_is_no_model_and_the_command_that_makes_one_is_named(
    exported: Callable[[str], tuple[Path, Path]],
) -> None:
    run, _ = exported("patch")
    patch = run / "export-patch"
    with pytest.raises(ModelError, match=rf"the trained rows alone; .*`qaft patch apply {patch} --base BASE"):
        diff_models(str(run), str(patch), prompts=None, gate=None)
    with pytest.raises(ModelError, match="the trained rows alone"):
        open_model(str(patch))


def test_an_export_that_cannot_be_loaded_says_what_is_wrong(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(exported("gptq")[1], tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"other: this export cannot be loaded: .*model\.norm\.weight"):
        open_model(str(other))


def test_a_gate_holds_beside_the_limits(exported: Callable[[str], tuple[Path, Path]]) -> None:
    run, export = exported("merged, original basis")
    with pytest.raises(DifferenceError, match=r"differ by .* relative; the gate is 1e-09"):
        diff_models(str(run), str(export), prompts=None, gate=1e-9)
