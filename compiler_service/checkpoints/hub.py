"""`hf:org/name@revision`: a Hugging Face repository, fetched into the hub's own local cache."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from compiler_service.checkpoints.checkpoint import FILE_NAMES, Checkpoint
from compiler_service.checkpoints.quantized_folder import SETTINGS_FILES, open_folder
from shared.errors import ModelNotFound

FETCHED = [
    "config.json", "*.safetensors", "model.safetensors.index.json", *FILE_NAMES, *SETTINGS_FILES
]  # fmt: skip
# The same weights once more: in their maker's own form, or in folders for other programs.
NOT_FETCHED = ["consolidated*", "*/*"]


def open_hub_repository(reference: str) -> Checkpoint:
    """The checkpoint of `org/name` or `org/name@revision`.

    Raises:
        ModelNotFound: no such repository or revision, no access, or no network.
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
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        problem = (
            f"the hub cannot be reached and it is not in the local cache ({type(error).__name__})"
        )
        raise _not_found(reference, problem) from error
    return open_folder(Path(folder), name=repository.rpartition("/")[2])


def _not_found(reference: str, problem: str) -> ModelNotFound:
    return ModelNotFound(model_uri=f"hf:{reference}", problem=problem)
