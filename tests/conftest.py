"""Fixtures shared by all tests: tiny random models, and the optional real model and data beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As the command line sets it where nobody watches; the library reads it when it is imported.
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from tiny_checkpoint import write_checkpoint

SHARED = Path(os.environ.get("QAFT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


PROCESSES = ("integration", "test_deepspeed.py", "test_ranks.py", "test_unreached.py", "test_export_memory.py")
"""Folders and files whose tests wait for processes: started first, so that no worker is left with them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not set(PROCESSES) & set(item.path.parts))  # a stable sort: files stay together


def _shared(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{relative} is not part of the project; set QAFT_SHARED to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """Folder of a real fp32 Llama of 260,032 parameters (hidden 64, 5 layers, 8/4 heads, tied embeddings)."""
    return _shared("models/stories260k-hf")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random fp32 Llama of three layers (hidden 128, 4/2 heads, untied) with a tokenizer of bytes."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    return write_checkpoint(tmp_path_factory.mktemp("tiny-llama"), dtype=torch.float32, **sizes)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public data sets used for measurements."""
    return _shared("data")


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # Tiny tensors gain nothing from more, and threads that wait for each other on busy cores cost a hundredfold:
    # 8 s instead of 0.08 s for one micro-batch beside another program on both of two cores.
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(0)
