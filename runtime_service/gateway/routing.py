"""Which runtime a generation goes to; pure.

Prompts that begin alike go to one runtime, whose prefix cache then knows them; unless that one has
clearly more to do than the others. A prompt that begins as none did before is in no cache, and goes to
the runtime that has least to do; those that begin like it follow it there. Each gateway knows what it
sent itself; where it knows nothing the hash decides, which all agree on without a word. Sources: Thaler
and Ravishankar 1998, "Using name-based mappings to increase hit rates" (rendezvous hashing); Mirrokni et
al. 2018, "Consistent hashing with bounded loads".
"""

from collections import OrderedDict
from collections.abc import Container, Sequence
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
    """How the last prompts began that this gateway has sent, and to which runtimes."""

    def __init__(self, most: int = KNOWN_PREFIXES) -> None:
        self._most = most
        self._addresses: OrderedDict[int, str] = OrderedDict()

    def address_of(self, prefix: bytes) -> str | None:
        """The runtime that the last prompt was sent to that begins so; None: there was none."""
        return self._addresses.get(hash(prefix))

    def sent(self, prefix: bytes, address: str) -> None:
        """A prompt that begins so was sent there; what was not for longest is forgotten."""
        self._addresses[hash(prefix)] = address
        self._addresses.move_to_end(hash(prefix))
        if len(self._addresses) > self._most:
            self._addresses.popitem(last=False)

    def refused(self, prefix: bytes, addresses: Container[str]) -> None:
        """These did not take the prompt that begins so: no cache of theirs has it from there."""
        if self.address_of(prefix) in addresses:
            del self._addresses[hash(prefix)]


def choose(candidates: Sequence[Candidate], prefix: bytes, known_at: str | None) -> str:
    """The address of the one to take; there is at least one candidate.

    Args:
        known_at: the runtime that prompts that begin so were sent to last; None: they never were.
    """
    loads = [candidate.load_tokens for candidate in candidates]
    is_known = known_at is not None
    bound = sum(loads) / len(loads) * BOUND_RATIO + BOUND_TOKENS if is_known else min(loads)
    fitting = [candidate.address for candidate in candidates if candidate.load_tokens <= bound]
    if known_at in fitting:
        return known_at
    return max(fitting, key=lambda address: _weight(address, prefix))


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
