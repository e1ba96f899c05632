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


class Remaining:
    """How long a build still takes, if the rest goes as what was done did."""

    def __init__(self) -> None:
        self._stage, self._done_bytes = "", 0
        self._is_repeated = False

    def seconds(
        self, elapsed_s: float, stage: str, fraction: float, done_bytes: int
    ) -> float | None:
        """Seconds to the end; None while too little is done, and in a stage that began again.

        The search for layers to keep reads the model as often as it takes, which nobody knows before.
        """
        if stage != self._stage:
            self._is_repeated = False
        elif done_bytes < self._done_bytes:
            self._is_repeated = True
        self._stage, self._done_bytes = stage, done_bytes
        if fraction < 0.02 or elapsed_s < 0.5 or self._is_repeated:
            return None
        return round(elapsed_s * (1 - fraction) / fraction, 1)
