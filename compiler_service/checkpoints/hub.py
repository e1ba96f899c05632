"""`hf:org/name@revision`: a Hugging Face repository, fetched into the hub's own local cache."""

import errno
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from compiler_service.checkpoints.checkpoint import FILE_NAMES, Checkpoint
from compiler_service.checkpoints.quantized_folder import SETTINGS_FILES, open_folder
from shared.errors import DiskFull, MillraceError, ModelNotFound

FETCHED = [
    "config.json", "*.safetensors", "model.safetensors.index.json", *FILE_NAMES, *SETTINGS_FILES
]  # fmt: skip
# The same weights once more: in their maker's own form, or in folders for other programs.
NOT_FETCHED = ["consolidated*", "*/*"]


def open_hub_repository(reference: str) -> Checkpoint:
    """The checkpoint of `org/name` or `org/name@revision`.

    Raises:
        ModelNotFound: no such repository or revision, no access, no network, or no way to write it down.
        DiskFull: there is no room for it.
    """
    repository, _, revision = reference.partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=FETCHED,
            ignore_patterns=NOT_FETCHED,
        )
    except GatedRepoError as error:
        raise _not_found(reference, "its owners must grant access to your token") from error
    except RevisionNotFoundError as error:
        raise _not_found(reference, f"it has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise _not_found(reference, "the hub knows no such repository, or it is private") from error
    except HFValidationError as error:
        raise _not_found(reference, "a repository is called org/name") from error
    except OSError as error:
        raise failure_of(reference, error) from error
    return open_folder(Path(folder), name=repository.rpartition("/")[2])


def failure_of(reference: str, error: OSError) -> MillraceError:
    """What it means that fetching `reference` ended with `error`: the network's fault, or this machine's."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(path=constants.HF_HUB_CACHE)
    # The hub's library raises its own OSErrors for all that the network does; they have no number.
    if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
        problem = (
            f"the hub cannot be reached and it is not in the local cache ({type(error).__name__})"
        )
    else:
        problem = f"it cannot be kept in {constants.HF_HUB_CACHE}: {error.strerror}"
    return _not_found(reference, problem)


def _not_found(reference: str, problem: str) -> ModelNotFound:
    return ModelNotFound(model_uri=f"hf:{reference}", problem=problem)
