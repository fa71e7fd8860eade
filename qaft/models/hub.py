"""A model repository of the Hugging Face hub as a local folder, without the files that loading does not read."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

from qaft.errors import ModelError
from qaft.models.shards import weight_files

_METADATA = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def download(name: str, *, revision: str | None, code: bool, weights: bool = True) -> Path:
    """Return the folder of the snapshot of ``name``; only missing files are downloaded.

    Weights are fetched by the names in the index: repositories often carry the same weights in other formats too.

    Args:
        name: ``organisation/model``.
        revision: branch, tag or commit; None for the default branch.
        code: fetch Python files too (``trust_remote_code``).
        weights: fetch the weights; else only what is beside them.

    Raises:
        ModelError: no such repository, no access, or no network and not in the cache.
    """
    metadata = [*_METADATA, "*.py"] if code else [*_METADATA]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=metadata))
        if weights:
            snapshot_download(name, revision=revision, allow_patterns=list(weight_files(folder)))
    except GatedRepoError as error:
        raise ModelError(f"{name}: access is gated; accept its licence on the hub, then `hf auth login`") from error
    except HFValidationError as error:
        raise ModelError(f"{name!r}: neither a local path nor a hub id (organisation/model): {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{name}: no such local folder, and the hub does not give it{f' at {revision}' if revision else ''}: "
            f"{str(error).splitlines()[0]}; check the name and the network, or download it into a folder and give that"
        ) from error
    return folder
