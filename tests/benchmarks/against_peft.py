"""Speed and memory of one training step beside PEFT QLoRA: same model, scope, batch and data, one process per system.

    python tests/benchmarks/against_peft.py --model FOLDER [--steps 6] [--rounds 3] [--batch 4] [--length 256] [--out FILE]

Systems take turns (round by round), because machines are shared and only ratios within one run mean anything. Reported is
the best step of all rounds (the least disturbed one), and the peak of resident memory above what the process held before the
model was loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SYSTEMS = ("peft-nf4", "qaft-nf4-lowrank", "qaft-int4-lowrank", "qaft-int4-qat-dense", "qaft-int4-qat-lowrank")
RANK, ALPHA, LR = 8, 16, 1e-4


def peft_step(model_path: str) -> Callable[..., None]:
    """PEFT as its documentation shows QLoRA."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16, quantization_config=quantization)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)

    def step(ids, labels) -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def qaft_step(model_path: str, system: str) -> Callable[..., None]:
    """Our own, built from a recipe as ``qaft train`` builds it."""
    from qaft.build import build_run
    from qaft.recipe import parse_recipe

    _, storage, *rest = system.split("-")
    qat = rest[0] == "qat"
    update = {"kind": "lowrank", "rank": RANK, "alpha": ALPHA} if rest[-1] == "lowrank" else {"kind": "dense"}
    grid = {"bits": 4, "group_size": 64}
    recipe = {
        "model": {"name": model_path, "storage": storage},
        "select": {"targets": ["q_proj", "v_proj"]},
        "update": update,
        "optim": {"lr": LR, "clip": None},
        **({"qat": {"weights": grid}} if qat else {}),
    }
    if storage == "int4" and not qat:
        recipe["model"]["group_size"] = 64
    run = build_run(parse_recipe(recipe))
    from qaft.layers.attach import trainable_parameters
    from qaft.train.engine import AccelerateEngine
    from qaft.train.groups import param_groups
    from qaft.train.loss import CausalLoss
    from qaft.train.optimizers import make_optimizer

    params = trainable_parameters(run.loaded.model)
    optimizer = make_optimizer(param_groups(params.items(), run.recipe.optim), run.recipe.optim, run.device)
    engine = AccelerateEngine(CausalLoss(run.loaded.model), optimizer, clip=None, cpu=run.device.type == "cpu")

    def step(ids, labels) -> None:
        targets = int((labels[:, 1:] != -100).sum())
        engine.backward(engine(input_ids=ids, labels=labels) / targets)
        engine.step()

    return step


def measure(system: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run steps of one system in this process and return its best step and its memory."""
    import torch

    from qaft.train.log import peak_memory_gib

    torch.manual_seed(0)
    build = peft_step if system == "peft-nf4" else lambda path: qaft_step(path, system)
    if system == "peft-nf4":
        import peft  # noqa: F401
    else:
        import qaft.build  # noqa: F401
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = peak_memory_gib(device)
    step = build(arguments.model)
    ids = torch.randint(0, 40_000, (arguments.batch, arguments.length), device=device)
    labels = ids.clone()
    labels[:, : int(arguments.length * arguments.masked)] = -100
    seconds = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        step(ids, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "peak_gib": peak_memory_gib(device) - before}


def main() -> None:
    """Measure every system in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or .gguf of the base model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--masked", type=float, default=0.0, help="fraction of each row that carries no loss")
    parser.add_argument("--systems", nargs="*", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT " + json.dumps(measure(arguments.child, arguments)))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        for system in arguments.systems:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", system]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            line = next(text for text in output.splitlines() if text.startswith("RESULT "))
            result = json.loads(line.removeprefix("RESULT "))
            known = best.setdefault(system, result)
            best[system] = {key: min(known[key], result[key]) for key in result}
    text = table(best, arguments)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def table(best: dict[str, dict[str, float]], arguments: argparse.Namespace) -> str:
    """Return the results as Markdown, relative to the first system."""
    import torch

    tokens = arguments.batch * arguments.length
    reference = next(iter(best.values()))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"Command: `python tests/benchmarks/against_peft.py {' '.join(sys.argv[1:])}`",
        f"{device}; {arguments.batch} x {arguments.length} tokens per step, "
        f"{arguments.masked:.0%} of them without loss; q_proj and v_proj; best of {arguments.rounds} x {arguments.steps - 1} steps.",
        "",
        "| system | tokens/s | ratio | memory above imports, GiB | ratio |",
        "|---|--:|--:|--:|--:|",
    ]
    for system, row in best.items():
        speed, memory = reference["seconds"] / row["seconds"], row["peak_gib"] / reference["peak_gib"]
        lines.append(
            f"| {system} | {tokens / row['seconds']:.0f} | {speed:.2f} | {row['peak_gib']:.2f} | {memory:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
