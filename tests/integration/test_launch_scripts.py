"""The scripts of launch/ compose the launchers' command lines, from any directory, and refuse what they cannot do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launched import LIMIT, ROOT, TRAIN

LAUNCH = ROOT / "launch"
RUN_GROUP = LAUNCH / "run_group.sh"
STUBBORN = "trap '' TERM; echo $BASHPID; while :; do sleep 0.05; done"
SCRIPTS = ["single_gpu.sh", "multi_gpu.sh", "multi_node.sh", "slurm.sbatch"]
DEEPSPEED = ["-m", "deepspeed.launcher.runner"]
TORCHRUN = ["-m", "torch.distributed.run"]
GIVEN = ["my recipe.yaml", "optim.lr=1e-3", "data.columns={a: b}"]

# Says what it was called with; asked with -c whether deepspeed is installed, it answers as the test wants.
STUB = """#!/bin/sh
[ "$1" = -c ] && exit "${NO_DEEPSPEED:-0}"
printf '%s\\n' "$@"
echo "GPU $CUDA_VISIBLE_DEVICES" >&2
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "python3": STUB,
        "srun": '#!/bin/sh\nshift\nexec "$@"\n',
        "scontrol": "#!/bin/sh\nprintf 'node7\\nnode9\\n'\n",
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def call(script: str, tools: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tools)}
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        env=clean | environment,
        cwd=tools.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )


def hostfile(tools: Path) -> str:
    path = tools.parent / "my hosts"
    path.write_text("a slots=2\nb slots=2\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [*DEEPSPEED, "--master_port", "29500"]),
        ({"GPUS": "4"}, [*DEEPSPEED, "--num_gpus", "4", "--master_port", "29500"]),
        ({"NO_DEEPSPEED": "1"}, [*TORCHRUN, "--nproc_per_node", "gpu", "--master_port", "29500"]),
        (
            {"LAUNCHER": "torchrun", "GPUS": "2", "MASTER_PORT": "7"},
            [*TORCHRUN, "--nproc_per_node", "2", "--master_port", "7"],
        ),
    ],
)
def test_many_gpus_are_one_process_each(tools: Path, environment: dict[str, str], expected: list[str]) -> None:
    done = call("multi_gpu.sh", tools, *GIVEN, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*expected, TRAIN, *GIVEN]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["--master_port", "29500"]),
        ({"GPUS": "1"}, ["--master_port", "29500", "--num_gpus", "1"]),
        (
            {"NODE_RANK": "1", "MASTER_ADDR": "a"},
            ["--master_port", "29500", "--master_addr", "a", "--no_ssh", "--node_rank", "1"],
        ),
    ],
)
def test_many_nodes_by_hostfile(tools: Path, environment: dict[str, str], expected: list[str]) -> None:
    hosts = hostfile(tools)
    done = call("multi_node.sh", tools, *GIVEN, HOSTFILE=hosts, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*DEEPSPEED, "--hostfile", hosts, *expected, TRAIN, *GIVEN]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        ({"NODE_RANK": "0"}, ["--rdzv_conf", "is_host=1"]),
        ({"NODE_RANK": "3", "LOCAL_ADDR": "10.0.0.4"}, ["--local_addr", "10.0.0.4", "--rdzv_conf", "is_host=0"]),
    ],
)
def test_many_nodes_that_meet(tools: Path, environment: dict[str, str], expected: list[str]) -> None:
    done = call("multi_node.sh", tools, *GIVEN, NNODES="2", MASTER_ADDR="a", MASTER_PORT="5", **environment)
    assert done.returncode == 0, done.stderr
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "a:5", "--rdzv_id", "qaft"]
    head = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "gpu", *meeting, *expected]
    assert done.stdout.splitlines() == [*head, TRAIN, *GIVEN]


def test_slurm_starts_one_torchrun_per_node_that_meet_on_the_first(tools: Path) -> None:
    job = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_JOB_NUM_NODES": "2"}
    done = call("slurm.sbatch", tools, *GIVEN, **job, SLURM_SUBMIT_DIR=str(ROOT), SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 0, done.stderr
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "node7:24567", "--rdzv_id", "1234567"]
    head = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "8", *meeting]
    # Before what the user gives, so that the user may say otherwise.
    assert done.stdout.splitlines() == [*head, TRAIN, GIVEN[0], "train.resume=true", *GIVEN[1:]]


def test_slurm_finds_no_checkout(tools: Path) -> None:
    done = call("slurm.sbatch", tools, *GIVEN, SLURM_JOB_ID="1", SLURM_SUBMIT_DIR=str(tools))
    assert done.returncode == 2
    assert "set QAFT_ROOT" in done.stderr


@pytest.mark.parametrize(
    ("environment", "gpu"),
    [({}, "0"), ({"CUDA_VISIBLE_DEVICES": "3"}, "3"), ({"CUDA_VISIBLE_DEVICES": "3", "GPU": "5"}, "5")],
)
def test_one_gpu_is_chosen_by_the_environment(tools: Path, environment: dict[str, str], gpu: str) -> None:
    done = call("single_gpu.sh", tools, *GIVEN, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [TRAIN, *GIVEN]
    assert done.stderr == f"GPU {gpu}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_use_shows_the_use(tools: Path, script: str, arguments: list[str]) -> None:
    done = call(script, tools, *arguments)
    assert done.returncode == 2
    assert f"launch/{script} RECIPE [section.key=value ...]" in done.stderr
    assert "\nEnvironment:\n" in done.stderr
    assert "set -" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("multi_gpu.sh", {"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: must be deepspeed or torchrun"),
        ("multi_node.sh", {}, "set HOSTFILE (deepspeed) or NNODES (torchrun)"),
        ("multi_node.sh", {"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere cannot be read"),
        ("multi_node.sh", {"HOSTFILE": "/dev/null", "NNODES": "2"}, "set one of them"),
        ("multi_node.sh", {"HOSTFILE": "/dev/null", "NODE_RANK": "0"}, "NODE_RANK needs MASTER_ADDR"),
        ("multi_node.sh", {"NNODES": "2"}, "NNODES needs MASTER_ADDR"),
    ],
)
def test_what_is_missing_or_impossible_is_named(
    tools: Path, script: str, environment: dict[str, str], message: str
) -> None:
    done = call(script, tools, *GIVEN, **environment)
    assert done.returncode == 2
    assert message in done.stderr


@contextmanager
def group(*command: str, grace: str = "20", script: Path = RUN_GROUP) -> Iterator[subprocess.Popen[str]]:
    process = started([str(script), *command], {**os.environ, "GRACE": grace})
    with process:
        try:
            yield process
            process.wait(timeout=LIMIT)
        finally:
            # A script that waits for ever is a failure, and not of all tests after it.
            process.kill()


def started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    # Background jobs of a shell start with SIGINT ignored, and a shell cannot trap what was ignored when it started.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


# A launcher that dies of its signal at once, while its process says what it got and needs a while to end.
SLOW = """
import os, signal, sys, time
def handle(number, frame):
    time.sleep(0.3)
    # Not print(): the signal may come while "ready" is being printed, and that cannot be entered twice.
    os.write(1, f"got {signal.Signals(number).name}\\n".encode())
    os._exit(0)
if os.fork() == 0:
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    os.write(1, b"ready\\n")
else:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
while True:
    time.sleep(0.05)  # and not pause(): a signal that comes just before it would leave it waiting for ever
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_whole_group_and_is_waited_for(number: signal.Signals, code: int) -> None:
    with group(sys.executable, "-c", SLOW) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == f"got {number.name}\n"
    assert process.returncode == code


def test_a_signal_while_the_command_starts_is_not_lost() -> None:
    for _ in range(4):
        with group("bash", "-c", "kill -TERM $PPID; while :; do sleep 0.05; done") as process:
            process.communicate(timeout=LIMIT)
        assert process.returncode == 143


def test_a_signal_just_before_the_script_waits_starts_the_grace(tmp_path: Path) -> None:
    text, waits = RUN_GROUP.read_text(), "\ncode=0\n"
    assert text.count(waits) == 1
    slow = tmp_path / "run_group.sh"
    slow.write_text(text.replace(waits, f"\nsleep 1{waits}"))
    slow.chmod(0o755)
    with group("bash", "-c", STUBBORN, grace="1", script=slow) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT)
    assert process.returncode == 143


def test_the_exit_code_is_the_launchers() -> None:
    for code in (0, 7):
        with group("bash", "-c", f"exit {code}") as process:
            pass
        assert process.returncode == code


def test_a_launcher_that_leaves_processes_behind_has_failed_and_they_end() -> None:
    leave = "(trap 'echo got TERM; exit' TERM; echo ready; while :; do sleep 0.05; done) & sleep 0.3; exit 0"
    with group("bash", "-c", leave) as process:
        output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert output == "ready\ngot TERM\n"


def test_what_ignores_sigterm_is_killed_after_the_grace() -> None:
    with group("bash", "-c", STUBBORN, grace="1") as process:
        assert process.stdout is not None
        stubborn = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT)
    assert process.returncode == 143
    deadline = time.monotonic() + LIMIT
    while Path(f"/proc/{stubborn}/cmdline").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{stubborn}").exists()
