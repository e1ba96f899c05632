"""Which runtime a generation goes to; pure.

Prompts that begin alike go to one runtime, whose prefix cache then knows them; unless that one has
clearly more to do than the others. A prompt that begins as none did before is in no cache, and goes to
the runtime that has least to do. Sources: Thaler and Ravishankar 1998, "Using name-based mappings
to increase hit rates" (rendezvous hashing); Mirrokni et al. 2018, "Consistent hashing with bounded
loads".
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from millrace.runtime.v1 import runtime_pb2 as pb

# How much of a prompt says which others begin alike.
PREFIX_TOKENS = 64
PREFIX_CHARS = 256
# What a runtime may have to do more than the average before it is passed over, in tokens: a part
# and a constant. A running sequence counts as some, for it will draw some.
BOUND_RATIO = 1.25
BOUND_TOKENS = 512
RUNNING_TOKENS = 16
# How many beginnings are remembered, which takes some 2 MB.
KNOWN_PREFIXES = 1 << 14


@dataclass(frozen=True, slots=True)
class Candidate:
    """A runtime that can take a generation now.

    Args:
        load_tokens: that it has to compute.
    """

    address: str
    load_tokens: float


class KnownPrefixes:
    """How the last prompts began that this gateway has sent to runtimes."""

    def __init__(self, most: int = KNOWN_PREFIXES) -> None:
        self._most = most
        self._hashes: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, prefix: bytes) -> bool:
        return hash(prefix) in self._hashes

    def add(self, prefix: bytes) -> None:
        """A prompt that begins so was sent; what was not for longest is forgotten."""
        self._hashes[hash(prefix)] = None
        self._hashes.move_to_end(hash(prefix))
        if len(self._hashes) > self._most:
            self._hashes.popitem(last=False)


def choose(candidates: Sequence[Candidate], prefix: bytes, *, is_known: bool) -> str:
    """The address of the one to take; there is at least one candidate.

    Args:
        is_known: prompts that begin so have been sent before, and their runtime may know them.
    """
    loads = [candidate.load_tokens for candidate in candidates]
    bound = sum(loads) / len(loads) * BOUND_RATIO + BOUND_TOKENS if is_known else min(loads)
    fitting = [candidate for candidate in candidates if candidate.load_tokens <= bound]
    return max(fitting, key=lambda candidate: _weight(candidate.address, prefix)).address


def prefix_of(start: pb.StartGeneration, cache_salt: str) -> bytes:
    """What prompts have in common that begin alike; tenants share no cache, so no prefix."""
    kind = start.WhichOneof("prompt")
    if kind == "token_ids":
        head = ",".join(map(str, start.token_ids.ids[:PREFIX_TOKENS]))
    elif kind == "chat":
        head = ""
        for message in start.chat.messages:
            head += f"{message.role}\0{message.content[:PREFIX_CHARS]}\0"
            if len(head) >= PREFIX_CHARS:
                break
    else:
        head = start.text
    return f"{cache_salt}\0{head[:PREFIX_CHARS]}".encode(errors="surrogatepass")


def _weight(address: str, prefix: bytes) -> bytes:
    # A name may be longer than a key can be, and differ from others at its end alone.
    key = blake2b(address.encode(), digest_size=16).digest()
    return blake2b(prefix, digest_size=8, key=key).digest()
