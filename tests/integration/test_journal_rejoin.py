"""A rank of a zeroth-order run dies, the launcher starts it again, and it is back at the step where it died."""

from __future__ import annotations

from pathlib import Path

import torch
from launched import FAULTY, ROOT, TORCHRUN, TRAIN, run
from safetensors.torch import load_file

from qaft.train.journal import JOURNAL, read_journal

RECIPE = str(ROOT / "configs" / "lozo_tiny_cpu.yaml")
STEPS = ["train.steps=8", "train.save_every=null", "data.valid=null", "train.resume=true", "export=[]"]


def test_ranks_that_torchrun_starts_again_rejoin_from_the_journal(workplace: Path) -> None:
    # Folders of its own: other tests have a workplace with them on the same worker.
    folders = {"rejoin/killed": (FAULTY, {"FAULT": "1 5 kill"}), "rejoin/undisturbed": (TRAIN, {})}
    for output, (script, environment) in folders.items():
        # No checkpoint before the end: what the ranks come back to is in the journal alone.
        launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max_restarts", "1"]
        code, said = run([*launcher, script, RECIPE, *STEPS, f"train.output={output}"], workplace, environment)
        assert code == 0, said
        assert ("exitcode: -9" in said) == (script is FAULTY), said
    killed, undisturbed = (read_journal(workplace / output / JOURNAL).records for output in folders)
    assert [record.step for record in killed] == list(range(8))
    assert [record.c for record in killed] == [record.c for record in undisturbed]
    ends = [load_file(workplace / output / "checkpoint-8" / "trainables.safetensors") for output in folders]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert any(value.any() for value in ends[0].values())
