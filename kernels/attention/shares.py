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
        window: keys that a query sees at most, in all layers; 0: all before it.
        apart_beyond: in steps of more tokens only sequences with one query token are cut, as those with several are
            another launch's; 0: in none.
    """

    most: int
    tile_queries: int
    window: int = 0
    apart_beyond: int = 0

    def further_parts(
        self, counts_S: npt.NDArray[np.int32], ends_S: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """Further parts of each sequence, of all its tiles together; `most` at most.

        Args:
            counts_S: query tokens of each sequence.
            ends_S: its tokens after the step.
        """
        num_tokens = int(counts_S.sum())
        if self.apart_beyond and num_tokens > self.apart_beyond:
            tiles_S = (counts_S == 1).astype(np.int64)
            least = _LEAST_KEYS
        else:
            tiles_S = -(-counts_S.astype(np.int64) // self.tile_queries)
            has_several = num_tokens > np.count_nonzero(counts_S)
            least = _LEAST_KEYS_OF_SEVERAL if has_several else _LEAST_KEYS
        keys_S = np.minimum(ends_S, counts_S + self.window) if self.window else ends_S
        share = max(least, -(-int(tiles_S @ keys_S) // self.most))
        parts_S: npt.NDArray[np.int64] = tiles_S * np.maximum((keys_S - 1) // share, 0)
        return parts_S
