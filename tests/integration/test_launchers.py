"""Every launcher starts the same run: the losses that one process logs, whatever starts it and on however many ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from launched import ACCELERATE, DEEPSPEED, RECIPE, THREE_STEPS, TORCHRUN, TRAIN, free_port, own_lines, records, run


def command(launcher: str, folder: Path) -> list[str]:
    port = str(free_port())
    hosts = folder / "hosts"
    hosts.write_text("localhost slots=2\n", encoding="utf-8")
    # One host needs neither ssh nor pdsh, but deepspeed asks for both unless it is told the address.
    one_host = ["--hostfile", str(hosts), "--no_ssh_check", "--master_addr", "127.0.0.1"]
    return {
        "deepspeed": [*DEEPSPEED, "--num_gpus", "2", "--master_port", port],
        "deepspeed --hostfile": [*DEEPSPEED, *one_host, "--master_port", port],
        "torchrun": [*TORCHRUN, "--nproc_per_node", "2", "--master_port", port],
        "accelerate launch": [*ACCELERATE, "--num_processes", "1", "--cpu"],
        "accelerate launch --multi_gpu": [
            *ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", port,
        ],
    }[launcher]  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        ("deepspeed", []),
        ("deepspeed --hostfile", ["--deepspeed", "zero2"]),
        ("torchrun", []),
        ("accelerate launch", []),
        ("accelerate launch --multi_gpu", []),
    ],
)
def test_a_launcher_gives_the_losses_of_one_process(
    launcher: str, engine: list[str], workplace: Path, single: Path
) -> None:
    output_folder = launcher.replace(" ", "")
    arguments = [TRAIN, RECIPE, *THREE_STEPS, f"train.output={output_folder}", *engine]
    code, output = run([*command(launcher, workplace), *arguments], workplace)
    assert code == 0, output
    expected, given = records(single), records(workplace / output_folder)
    assert [line.keys() for line in given] == [line.keys() for line in expected]
    assert len(given) == 4  # three steps and the last evaluation
    for line, reference in zip(given, expected, strict=True):
        assert line == pytest.approx(reference, rel=2e-6)
    # Only rank 0 speaks.
    assert output.count("step 1/3 loss") == output.count("run folder") == 1
    assert not own_lines(output)


def test_a_mistake_on_all_ranks_is_told_once_and_at_once(workplace: Path) -> None:
    launcher = [*TORCHRUN, "--nproc_per_node", "2", "--master_port", str(free_port())]
    code, output = run([*launcher, TRAIN, RECIPE, "optim.lrr=1"], workplace)
    assert code == 1
    (line,) = own_lines(output)
    assert line.startswith("rank 0: RecipeError: ")
    assert "optim.lrr is not a key" in line
    assert "exitcode  : 2" in output
