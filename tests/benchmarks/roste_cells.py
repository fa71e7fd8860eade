"""One cell of the RoSTE comparison: build, train or round, score. Everything goes through recipes.

W4     asymmetric, c = 0.95 (RoSTE's), per output channel unless a group size is given
A4 A8  asymmetric per token, c = 0.95; KV4: asymmetric per token and head, c = 0.95
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gptq import gptq_round
from rich.console import Console
from roste_data import summary_scores, wiki_perplexity
from roste_plan import ROTATIONS, SETTINGS, SIXTEEN, Cell, Config

from qaft.arch import arch_of
from qaft.build import Run, build_run
from qaft.commands.export import export_run
from qaft.data import load_samples
from qaft.data.calibration import calibration_of
from qaft.models.skeleton import linear_names
from qaft.models.source import source_of
from qaft.recipe import Recipe, parse_recipe
from qaft.rotations import Measured, measure
from qaft.sections import ExportSection
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.training import prepare_training

CLIP = 0.95
SCOPES = {"full": ["all"], "qv": ["q_proj", "v_proj"]}
_DELTAS = ("delta_w", "delta_x", "delta_g", "delta_y")


class Bench:
    """Computes cells, keeping what several of them need in ``work``: fine-tuned checkpoints and measured errors.

    Args:
        config: shared by all cells.
        model: folder of the 16-bit model.
        paths: files of ``write_sets``.
        wiki: folder of the articles.
        work: scratch folder.
    """

    def __init__(self, config: Config, *, model: Path, paths: dict[str, Path], wiki: Path, work: Path) -> None:
        self.config = config
        self._model = model
        self._paths = paths
        self._wiki = wiki
        self._work = work

    def run(self, cell: Cell) -> dict[str, Any]:
        """Return everything that is known of a cell, JSON-able."""
        begin = time.monotonic()
        result: dict[str, Any] = asdict(cell) | {"lr": self._lr(cell)}
        if cell.method == "base":
            run = build_run(self._recipe(cell, self._model, qat=None))
        elif cell.method == "sft":
            run, trained = self._fine_tuned(cell)
            result |= trained
        elif cell.method in ROTATIONS:
            recipe, measured = self._rotated(cell)
            run, trained = _trained(recipe)
            result |= trained | measured
        else:
            run = self._rounded(cell)
        model, tokenizer = run.loaded.model, run.loaded.tokenizer
        result["ppl"] = wiki_perplexity(model, tokenizer, self._wiki, tokens=self.config.ppl_tokens)
        result |= summary_scores(model, tokenizer, self._paths, documents=self.config.documents)
        return result | {"seconds": round(time.monotonic() - begin, 1)}

    def _lr(self, cell: Cell) -> float | None:
        if cell.method in ("base", "rtn", "gptq"):
            return None
        return self.config.lr[cell.scope][cell.method != "sft"]

    def _recipe(
        self, cell: Cell, model: Path, *, qat: dict[str, Any] | None, targets: list[str] | None = None
    ) -> Recipe:
        config = self.config
        name = "-".join(str(part) for part in asdict(cell).values())
        return parse_recipe(
            {
                "model": {"name": str(model), "storage": "bf16" if qat is None else "int4"},
                "select": {"kind": "patterns", "targets": targets or SCOPES.get(cell.scope, ["all"])},
                "update": {"kind": "dense"},
                "qat": qat,
                "optim": {"lr": self._lr(cell) or 1e-4, "warmup": 0.1},
                "data": {
                    "train": str(self._paths["train"]),
                    "format": "prompt_completion",
                    "chat_template": "plain",
                    "train_on": "all",
                    "max_length": 512,
                },
                "train": {
                    "steps": config.steps,
                    "batch_size": config.batch,
                    "seed": cell.seed,
                    "log_every": max(1, config.steps // 10),
                    "output": str(self._work / name),
                },
            }
        )

    def _qat(self, cell: Cell, rotation: str) -> dict[str, Any]:
        bits, cached = SETTINGS[cell.setting]
        grid = {"bits": 4, "symmetric": False, "clip": CLIP}
        return {
            "weights": grid | {"group_size": self.config.group_size, "ste": "identity", "fused": True},
            "activations": None if bits is None else grid | {"bits": bits},
            "kv_cache": {"function": "roste", "bits": 4, "clip": CLIP} if cached else None,
            "rotation": rotation,
            "rotation_seed": cell.seed,
            "target": "simulation",
            "calibration_tokens": self.config.calibration_tokens,
        }

    def _fine_tuned(self, cell: Cell) -> tuple[Run, dict[str, Any]]:
        """Train in 16 bits and leave the merged checkpoint in the work folder."""
        run, trained = _trained(self._recipe(cell, self._model, qat=None))
        merged = ExportSection(format="merged", out=str(_export_of(run.folder)), verify=False, force=True)
        shutil.rmtree(_export_of(run.folder), ignore_errors=True)
        export_run(run, merged, Console(quiet=True))
        return run, trained

    def _rotated(self, cell: Cell) -> tuple[Recipe, dict[str, Any]]:
        """Return the recipe of a quantization-aware cell, with the measured choice where it is adaptive."""
        recipe = self._recipe(cell, self._model, qat=self._qat(cell, ROTATIONS[cell.method]))
        if cell.method != "adaptive":
            return recipe, {}
        source = source_of(recipe.model)
        patterns = SCOPES[cell.scope]
        names = linear_names(source.config)
        selected = frozenset(n for n in names if patterns == ["all"] or n.endswith(tuple(patterns)))
        measured = measure(recipe, source, selected, torch.device("cpu"))
        qat = self._qat(cell, "adaptive") | {"rotated": measured.choice.layers()}
        return self._recipe(cell, self._model, qat=qat), {
            "rotated": measured.choice.layers(),
            "errors": summarized(measured),
        }

    def _rounded(self, cell: Cell) -> Run:
        """Return the fine-tuned model of the cell's scope and seed with every linear rounded."""
        tuned = Cell(setting=SIXTEEN, scope=cell.scope, method="sft", seed=cell.seed)
        folder = self._recipe(tuned, self._model, qat=None).train.output
        if not _export_of(Path(folder)).is_dir():
            self._fine_tuned(tuned)
        recipe = self._recipe(cell, _export_of(Path(folder)), qat=self._qat(cell, "none"), targets=["all"])
        run = build_run(recipe)
        if cell.method == "gptq":
            samples = load_samples(recipe.data, run.loaded.tokenizer, "train").samples
            calibration = calibration_of(samples, tokens=self.config.calibration_tokens, seed=cell.seed)
            blocks = arch_of(run.loaded.source.config).layers()
            gptq_round(run.loaded.model, blocks, calibration.inputs(), calibration.real)
        return run


def summarized(measured: Measured) -> dict[str, dict[str, dict[str, float]]]:
    """Return kind of linear -> ``I`` (no rotation) or ``H`` (all that it can meet) -> mean errors over the layers."""
    found: dict[str, dict[str, list[Any]]] = {}
    for layer in measured.layers:
        for name, errors in layer.linears.items():
            kind = found.setdefault(name.rpartition(".")[2], {"I": [], "H": []})
            kind["I"].append(errors[False, False])
            kind["H"].append(errors[max(errors)])
    return {
        kind: {
            basis: {delta: statistics.mean(getattr(errors, delta) for errors in listed) for delta in _DELTAS}
            for basis, listed in bases.items()
        }
        for kind, bases in found.items()
    }


def _trained(recipe: Recipe) -> tuple[Run, dict[str, Any]]:
    shutil.rmtree(recipe.train.output, ignore_errors=True)
    run = build_run(recipe)
    training = prepare_training(run)
    state = fit(training, start_state(training))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    # A run of all weights leaves a checkpoint of gigabytes that nothing reads again.
    for checkpoint in run.folder.glob("checkpoint*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return run, {"losses": losses, "steps": state.step, "tokens": state.tokens}


def _export_of(folder: Path) -> Path:
    return folder / "merged"
