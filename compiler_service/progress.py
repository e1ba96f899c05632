"""How far a build is: what its child process tells its parent, the queue and whoever watches."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Where a running build is.

    Args:
        fraction: of the whole build.
        done_bytes: of the checkpoint, read in this stage; `total_bytes` are there.
        eta_s: None while nothing can be said.
    """

    stage: str
    fraction: float
    done_bytes: int = 0
    total_bytes: int = 0
    eta_s: float | None = None
