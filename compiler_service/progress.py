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


def remaining_s(elapsed_s: float, stage: str, fraction: float) -> float | None:
    """Seconds to a build's end, if the rest goes as what was done did; None while too little is done.

    None in `quality` too: the search for layers to keep reads the model as often as it takes, which
    nobody knows before.
    """
    if fraction < 0.02 or elapsed_s < 0.5 or stage == "quality":
        return None
    return round(elapsed_s * (1 - fraction) / fraction, 1)
