"""llama.cpp loads the exported file and says the same: tokens of a text, logits, and greedy continuations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_checkpoints import MODELS, gguf_grid, packed_model
from tiny_export import INFO, section, trained

from qaft.evaluate.float32 import float_logits
from qaft.export import EXPORTERS
from qaft.models.load import LoadedModel

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-llama-cpp builds it")
pytestmark = pytest.mark.llama_cpp

PROMPTS = ("Once upon a time, there was", "Lily and Tom went to the", "The big dog")
TEXTS = (*PROMPTS, "  two  spaces\n\nand a line", "It's 12:30, I'd say... (3 é 好)", "")
NEW_TOKENS = 16


@contextmanager
def opened(folder: Path) -> Iterator[Any]:
    model = llama_cpp.Llama(
        str(folder / "model.gguf"), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    try:
        yield model
    finally:
        model.close()


def exported(loaded: LoadedModel, folder: Path) -> Path:
    EXPORTERS["gguf"](loaded, section("gguf"), folder, INFO)
    return folder


def their_logits(model: Any, ids: torch.Tensor) -> np.ndarray:
    model.reset()
    model.eval(ids.tolist())
    return np.array(model.scores[: len(ids)])


def their_greedy(model: Any, ids: list[int]) -> list[int]:
    new = model.generate(ids, temp=0.0, repeat_penalty=1.0)
    return [*ids, *(next(new) for _ in range(NEW_TOKENS))]


# type -> how the model was trained, and the largest logit difference relative to the largest logit. F32: what a cache of
# keys and values in fp16 costs; the block types: inputs of their layers are quantized to 8 bits by llama.cpp.
STORIES: dict[str, tuple[dict[str, Any], float]] = {
    "F32": ({}, 2e-3),
    "F16": ({"dtype": "float16"}, 5e-3),
    "Q8_0": ({"qat": gguf_grid("q8_0"), "dtype": "float32"}, 0.05),
    "Q4_0": ({"qat": gguf_grid("q4_0"), "dtype": "float32"}, 0.05),
    "Q4_0, int4 groups of 64": ({"qat": gguf_grid("int", group_size=64), "dtype": "bfloat16"}, 0.05),
    "MXFP4": ({"qat": gguf_grid("mxfp4"), "dtype": "float32"}, 0.05),
}


@pytest.fixture(scope="module", params=STORIES)
def stories(request: pytest.FixtureRequest, stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained model, the folder of its file, and the bound. Rows of down_proj are no whole number of blocks."""
    options, bound = STORIES[request.param]
    options = {"dtype": "float32", **options}
    loaded = trained(stories260k, "rows", select=lambda n: not n.endswith("down_proj"), size=0.02, **options)
    return loaded, exported(loaded, tmp_path_factory.mktemp("stories") / "out"), bound


def test_greedy_continuations_are_equal_and_logits_are_near(stories: Any) -> None:
    loaded, folder, bound = stories
    with opened(folder) as model:
        for prompt in PROMPTS:
            given = loaded.tokenizer(prompt).input_ids
            ids = torch.tensor(their_greedy(model, given))
            ours = float_logits(loaded.model, [ids])[0].numpy()
            # By induction these are our own greedy tokens: each follows the ones before it.
            assert ours[len(given) - 1 : -1].argmax(-1).tolist() == ids[len(given) :].tolist(), prompt
            assert np.abs(their_logits(model, ids) - ours).max() <= bound * np.abs(ours).max(), prompt


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_texts_have_the_same_tokens(kind: str, stories260k: Path, tmp_path: Path) -> None:
    loaded = trained(stories260k) if kind == "sentencepiece" else packed_model("llama", tmp_path / "checkpoint")
    with opened(exported(loaded, tmp_path / "out")) as model:
        for text in TEXTS:
            assert model.tokenize(text.encode(), add_bos=True, special=True) == loaded.tokenizer(text).input_ids, text


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_the_layout_and_constants_of_llama_cpp(tmp_path: Path, name: str) -> None:
    loaded = packed_model(name, tmp_path / "checkpoint", storage="int8_group")
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
    with opened(exported(loaded, tmp_path / "out")) as model:
        theirs = their_logits(model, ids)
    ours = float_logits(loaded.model, [ids])[0].numpy()
    assert np.abs(theirs - ours).max() <= 0.05 * np.abs(ours).max()
