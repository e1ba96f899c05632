"""Where prompts go: alike to one place, unless that place has too much to do."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.routing import (
    BOUND_TOKENS,
    Candidate,
    KnownPrefixes,
    choose,
    prefix_of,
)

ADDRESSES = [f"10.0.0.{number}:7602" for number in range(5)]
# One that the fleet has lost.
GONE = "10.0.0.9:7602"
LOADS = st.lists(st.integers(0, 100_000), min_size=1, max_size=5)


def candidates(*loads: float) -> list[Candidate]:
    return [Candidate(address, load) for address, load in zip(ADDRESSES, loads, strict=False)]


@given(LOADS, st.binary(max_size=40), st.sampled_from([*ADDRESSES, GONE]))
def test_chosen_runtime_has_no_more_to_do_than_the_bound_allows(
    loads: list[int], prefix: bytes, known_at: str
) -> None:
    address = choose(candidates(*loads), prefix, known_at)
    load = loads[ADDRESSES.index(address)]
    assert load <= 1.25 * sum(loads) / len(loads) + BOUND_TOKENS


@given(st.binary(max_size=40), st.integers(0, 4))
def test_loss_of_a_runtime_moves_only_the_prompts_that_went_there(prefix: bytes, lost: int) -> None:
    before = choose(candidates(0, 0, 0, 0, 0), prefix, GONE)
    rest = [c for c in candidates(0, 0, 0, 0, 0) if c.address != ADDRESSES[lost]]
    assert choose(rest, prefix, GONE) == before or before == ADDRESSES[lost]


def test_prompts_spread_over_idle_runtimes() -> None:
    for known_at in (GONE, None):
        counts = Counter(choose(candidates(0, 0, 0), str(n).encode(), known_at) for n in range(300))
        assert min(counts.values()) > 60


@given(LOADS, st.binary(max_size=40))
def test_prompt_that_no_cache_can_know_goes_where_least_is_to_do(
    loads: list[int], prefix: bytes
) -> None:
    address = choose(candidates(*loads), prefix, None)
    assert loads[ADDRESSES.index(address)] == min(loads)


@given(LOADS, st.lists(st.integers(0, 256), min_size=5, max_size=5), st.binary(max_size=40))
def test_prompts_that_begin_alike_follow_the_first_whatever_the_loads_were_then(
    before: list[int], after: list[int], prefix: bytes
) -> None:
    known = KnownPrefixes()
    first = choose(candidates(*before), prefix, known.address_of(prefix))
    known.sent(prefix, first)
    assert choose(candidates(*after), prefix, known.address_of(prefix)) == first


@given(st.binary(max_size=40), st.integers(0, 4))
def test_prompts_whose_runtime_is_gone_or_overloaded_go_where_the_hash_says(
    prefix: bytes, number: int
) -> None:
    home = ADDRESSES[number]
    others = [c for c in candidates(0, 0, 0, 0, 0) if c.address != home]
    by_hash = choose(others, prefix, GONE)
    assert choose(others, prefix, home) == by_hash
    assert choose([*others, Candidate(home, 10_000)], prefix, home) == by_hash


def test_prefixes_that_were_not_asked_for_longest_are_forgotten() -> None:
    known = KnownPrefixes(most=2)
    for prefix, address in ((b"a", "x"), (b"b", "x"), (b"a", "y"), (b"c", "x")):
        known.sent(prefix, address)
    assert [known.address_of(prefix) for prefix in (b"a", b"b", b"c")] == ["y", None, "x"]


def test_prefix_is_not_known_where_its_prompt_was_refused() -> None:
    known = KnownPrefixes()
    known.sent(b"a", "x")
    known.refused(b"a", {"y"})
    assert known.address_of(b"a") == "x"
    known.refused(b"a", {"x", "y"})
    assert known.address_of(b"a") is None


def test_prompts_spread_over_runtimes_whose_long_names_differ_at_their_ends() -> None:
    """As pods' do, whose namespace and service come first in some clusters."""
    host = "runtimes.a-namespace-with-a-long-name.a-cluster-with-a-long-name.example.org"
    runtimes = [Candidate(f"{host}:{port}", 0) for port in (7602, 7603, 7604)]
    counts = Counter(choose(runtimes, str(n).encode(), GONE) for n in range(300))
    assert len(counts) == 3
    assert min(counts.values()) > 60


def test_prompts_that_begin_alike_have_one_prefix() -> None:
    system = "You are a careful assistant. " * 20
    for make in (
        lambda end: pb.StartGeneration(text=system + end),
        lambda end: pb.StartGeneration(token_ids=pb.TokenIds(ids=[*range(64), len(end)])),
        lambda end: pb.StartGeneration(
            chat=pb.Chat(
                messages=[
                    pb.ChatMessage(role="system", content=system),
                    pb.ChatMessage(role="user", content=end),
                ]
            )
        ),
    ):
        assert prefix_of(make("one"), "") == prefix_of(make("three"), "")
        assert prefix_of(make("one"), "tenant") != prefix_of(make("one"), "")
