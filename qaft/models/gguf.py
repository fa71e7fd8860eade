"""A ``.gguf`` file as a safetensors folder, dequantized once and kept in a cache.

Dequantizing takes long (13 s for 135 million weights) and reads the whole file; the folder is read tensor by tensor.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qaft.errors import ModelError

CACHE_VARIABLE = "QAFT_CACHE"


def cache_folder() -> Path:
    """Return the folder for converted checkpoints: ``$QAFT_CACHE``, or ``~/.cache/qaft``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "qaft")


def converted_folder(file: Path, dtype: torch.dtype) -> Path:
    """Return where the conversion of ``file`` is kept; another path, size or modification time is another folder."""
    stat = file.stat()
    identity = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_folder() / f"{file.stem}-{str(dtype).removeprefix('torch.')}-{digest}"


def convert_gguf(file: Path, dtype: torch.dtype) -> Path:
    """Return a folder with the dequantized weights, config and tokenizer of ``file``; converts unless it exists.

    The folder appears in one piece: a killed conversion leaves nothing under its name. Converting needs memory for the
    whole model in ``dtype``.

    Args:
        file: the ``.gguf`` file.
        dtype: of the converted weights.

    Raises:
        ModelError: transformers does not know the file's architecture or tokenizer, or the cache cannot be written.
    """
    target = converted_folder(file, dtype)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ModelError(_unwritable(error)) from error
    try:
        _convert(file, dtype, unfinished)
        _publish(unfinished, target)
    except OSError as error:
        raise ModelError(_unwritable(error)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _convert(file: Path, dtype: torch.dtype, folder: Path) -> None:
    try:
        # Alone in a folder: of tokenizer files beside it transformers would take some, and leave out the chat template.
        with tempfile.TemporaryDirectory(prefix="qaft-gguf-") as alone:
            Path(alone, file.name).symlink_to(file.resolve())
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(alone, gguf_file=file.name, dtype=dtype)
    except Exception as error:  # on what they do not know the readers raise anything, struct.error to AttributeError
        raise ModelError(
            f"{file}: transformers cannot read this GGUF file ({type(error).__name__}: {error}); it may be truncated, "
            "or of an unknown architecture or quantization; give the model's safetensors checkpoint instead"
        ) from error
    _forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _forget_quantization(model: Any) -> None:
    # transformers marks the model as quantized although its weights are dense by now, and then refuses to save it.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def _publish(unfinished: Path, target: Path) -> None:
    unfinished.chmod(0o755)
    try:
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, with the same result
            raise


def _unwritable(error: OSError) -> str:
    return (
        f"{cache_folder()}: the converted checkpoint cannot be written ({error}); "
        f"set {CACHE_VARIABLE} to a folder with room"
    )
