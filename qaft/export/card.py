"""README.md and ``qaft_export.json``: what an exported folder says about itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from qaft import __version__
from qaft.evaluate.difference import Difference
from qaft.export.base import ExportInfo, Written
from qaft.models.served import STAMP as STAMP

_LOAD = {
    "merged": 'model = AutoModelForCausalLM.from_pretrained("{folder}")',
    "compressed-tensors": 'model = AutoModelForCausalLM.from_pretrained("{folder}")  # pip install compressed-tensors',
    "gguf": 'model = AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="model.gguf")  # or: llama-cli -m FILE',
    "bnb": 'model = AutoModelForCausalLM.from_pretrained("{folder}")  # pip install bitsandbytes accelerate',
    "gptq": 'model = AutoModelForCausalLM.from_pretrained("{folder}")  # pip install gptqmodel optimum; or vllm',
    "peft": 'model = AutoModelForCausalLM.from_pretrained("{folder}")  # base and adapter; pip install peft',
}

_LOAD_ON_FILE = """\
model = AutoModelForCausalLM.from_pretrained("{parent}", gguf_file="{file}", dtype="{dtype}")
model.load_adapter("{folder}")  # pip install peft gguf"""


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the recipe's canonical JSON."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()


def export_stamp(
    format: str, written: Written, info: ExportInfo, difference: Difference | None, rounding: Difference | None
) -> dict[str, Any]:
    """Return the machine-readable record of an export: format, grids, versions, recipe, and how it was checked."""
    return {
        "format": format,
        "qaft_version": __version__,
        "base_model": info.base,
        "dtype": str(written.dtype).removeprefix("torch."),
        "basis": written.basis,
        "bound": asdict(written.bound),
        "grids": [dict(grid) for grid in written.grids],
        "inputs": written.inputs,
        "recipe": dict(info.recipe),
        "trained": info.trained,
        "recipe_sha256": recipe_hash(info.recipe),
        "verified": None if difference is None else asdict(difference),
        "rounded": written.exported_weight is not None,
        "rounding": None if rounding is None else asdict(rounding),
        "notes": list(written.notes),
    }


def model_card(
    name: str,
    format: str,
    written: Written,
    info: ExportInfo,
    difference: Difference | None,
    rounding: Difference | None,
) -> str:
    """Return README.md of an export: how to load it, how it was made, and how far it is from what was trained."""
    header = {
        "base_model": info.base,
        "library_name": "peft" if format == "peft" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qaft", *([format] if format != "merged" else []), *map(_grid_name, written.grids)],
    }
    sections = [
        f"# {name}",
        f"{info.base}, fine-tuned and exported by qaft {__version__}.",
        _loading(name, format, info, written),
        _storage(format, written),
        _check(difference, rounding, written),
        _list("Notes", written.notes),
        _list("Metrics", [f"{key}: {value:.6g}" for key, value in info.metrics.items()]),
        _origin(info),
    ]
    front = yaml.safe_dump(header, sort_keys=False)
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _loading(name: str, format: str, info: ExportInfo, written: Written) -> str:
    if written.vllm_only:
        return f"## Load\n\n```\nvllm serve {name}\n```\n\ntransformers would leave out what is in transform_config."
    if format == "patch":
        return f"## Load\n\n```\nqaft patch apply {name} --base BASE --out MODEL\n```"
    line = _LOAD[format].format(folder=name)
    if format == "peft" and info.base.endswith(".gguf"):
        file, dtype = Path(info.base), info.recipe["model"].get("dtype", "bfloat16")
        line = _LOAD_ON_FILE.format(folder=name, parent=file.parent, file=file.name, dtype=dtype)
    return (
        "## Load\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'{line}\ntokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
    )


def _storage(format: str, written: Written) -> str:
    dtype = str(written.dtype).removeprefix("torch.")
    lines = [f"format: {format}, {dtype}", f"basis: {written.basis}"]
    for grid in written.grids:
        groups = "one scale per output channel" if grid["group_size"] is None else f"groups of {grid['group_size']}"
        inputs = f"; inputs int{grid['inputs']}, one scale per token" if grid.get("inputs") else ""
        lines.append(
            f"grid: {_grid_name(grid)}, {groups}, {'symmetric' if grid['symmetric'] else 'asymmetric'}{inputs}"
        )
    return _list("Weights", lines)


def _grid_name(grid: Mapping[str, Any]) -> str:
    return f"int{grid['bits']}" if grid["kind"] == "int" else grid["kind"]


def _check(difference: Difference | None, rounding: Difference | None, written: Written) -> str:
    if difference is None:
        return _list("Check", ["not verified: the export was written without reloading it"])
    served = written.vllm_only or written.inputs == "vllm"
    reader = "transformers, with inputs and transforms as vLLM has them," if served else "plain transformers"
    lines = [
        f"reloaded by {reader} in a fresh process, {difference.num_tokens} tokens, fp32 logits: "
        f"max relative difference {difference.max_relative:.1e}, KL {difference.kl_mean:.1e} nats, "
        f"same top token {difference.top1_agreement:.1%}"
    ]
    if rounding is not None:
        lines.append(
            f"what writing these weights costs against the run itself: KL {rounding.kl_mean:.1e} nats, "
            f"same top token {rounding.top1_agreement:.1%}"
        )
    return _list("Check", lines)


def _origin(info: ExportInfo) -> str:
    command = f"\n\n```\n{info.command}\n```" if info.command else ""
    recipe = yaml.safe_dump(dict(info.recipe), sort_keys=False)
    return f"## Made with{command}\n\n```yaml\n{recipe}```"


def _list(title: str, lines: Any) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""
