"""Two network namespaces joined by a cable are two hosts: they share files, as the README asks, but no address."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest
from launched import LIMIT, RECIPE, ROOT, THREE_STEPS, records, start

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """(namespace, network interface) of two hosts that reach each other and nothing else."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip (iproute2)")
    tag = uuid4().hex[:6]
    made = [(f"qaft-{tag}-{i}", f"qaft{tag}{i}") for i in range(2)]
    try:
        try:
            for namespace, _ in made:
                ip("netns", "add", namespace)
            ip("link", "add", made[0][1], "netns", made[0][0], "type", "veth", "peer", made[1][1], "netns", made[1][0])
            for (namespace, interface), address in zip(made, ADDRESSES, strict=True):
                ip("-n", namespace, "address", "add", f"{address}/30", "dev", interface)
                ip("-n", namespace, "link", "set", interface, "up")
                ip("-n", namespace, "link", "set", "lo", "up")
        except OSError as error:
            pytest.skip(f"this machine does not permit network namespaces: {error}")
        yield made
    finally:
        for namespace, _ in made:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def test_two_hosts_that_meet_by_torchrun_train_the_same_run(
    hosts: list[tuple[str, str]], workplace: Path, single: Path
) -> None:
    meeting = {"NNODES": "2", "GPUS": "1", "MASTER_ADDR": ADDRESSES[0], "JOB_ID": hosts[0][0], "PYTHON": sys.executable}
    with ExitStack() as stack:
        jobs = []
        for number, (namespace, interface) in enumerate(hosts):
            command = ["ip", "netns", "exec", namespace, str(ROOT / "launch" / "multi_node.sh"), RECIPE, *THREE_STEPS]
            # The host name is that of the machine outside, which neither of them reaches.
            host = {"NODE_RANK": str(number), "LOCAL_ADDR": ADDRESSES[number], "GLOO_SOCKET_IFNAME": interface}
            jobs.append(
                stack.enter_context(start([*command, "train.output=two-hosts"], workplace, {**meeting, **host}))
            )
        results = [job.launcher.communicate(timeout=LIMIT)[0] for job in jobs]
    assert [job.launcher.returncode for job in jobs] == [0, 0], results
    expected, given = records(single), records(workplace / "two-hosts")
    assert len(given) == len(expected) == 4
    for line, reference in zip(given, expected, strict=True):
        assert line == pytest.approx(reference, rel=2e-6)
    assert sum(output.count("step 1/3 loss") for output in results) == 1
