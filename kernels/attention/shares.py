"""How a step's attention is shared out: which sequences' keys are attended to in parts, so that no long one keeps a
device waiting. Plain arithmetic on lengths, by the host.

A tile of queries reads its sequence's keys in a first part, by a program of its own, and in further parts, by programs
that wait for whoever has work for them. All parts have about the same number of keys: a step's keys, each counted for
every tile that reads it, divided by the number of further programs. So their number always suffices, and of many
sequences of like lengths none is cut.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Fewer keys are not worth a part: a lone query's results are small, those of a tile of queries are not.
_LEAST_KEYS, _LEAST_KEYS_OF_SEVERAL = 64, 256


@dataclass(frozen=True, slots=True)
class Shares:
    """What the kernels of an engine take.

    Args:
        most: further parts of a step, for each kv head.
        tile_queries: query tokens of a tile, where a sequence has several.
    """

    most: int
    tile_queries: int

    def further_parts(
        self, counts_S: npt.NDArray[np.int32], ends_S: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """Further parts of each sequence, of all its tiles together; `most` at most.

        Args:
            counts_S: query tokens of each sequence.
            ends_S: its tokens after the step.
        """
        tiles_S = -(-counts_S.astype(np.int64) // self.tile_queries)
        least = _LEAST_KEYS if tiles_S.sum() == counts_S.sum() else _LEAST_KEYS_OF_SEVERAL
        keys = max(least, -(-int(tiles_S @ ends_S) // self.most))
        return tiles_S * np.maximum((ends_S - 1) // keys, 0)
