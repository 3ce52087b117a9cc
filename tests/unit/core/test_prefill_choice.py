"""Which prefill worker is asked directly: least to compute, backlog included."""

import random

import pytest

from kvmesh.core.ids import WorkerId
from kvmesh.core.prefill_choice import PrefillCandidate, choose_prefill_worker


def candidate(name: str, *, in_flight: int = 0, cached: int = 0) -> PrefillCandidate:
    return PrefillCandidate(WorkerId(name), tokens_in_flight=in_flight, cached_tokens=cached)


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        pytest.param([candidate("a", in_flight=10), candidate("b")], "b", id="the idle one"),
        pytest.param([candidate("a", cached=64), candidate("b")], "a", id="the one that holds the prefix"),
        pytest.param([candidate("a", in_flight=65, cached=64), candidate("b")], "b", id="a backlog outweighs a prefix"),
        pytest.param([candidate("a", in_flight=63, cached=64), candidate("b")], "a", id="a prefix outweighs a backlog"),
        pytest.param([candidate("a", cached=500), candidate("b", in_flight=1, cached=100)], "a", id="never below 0"),
    ],
)
def test_least_is_left_to_compute_at_the_chosen_one(candidates: list[PrefillCandidate], chosen: str) -> None:
    picked = choose_prefill_worker(candidates, prompt_tokens=100, rng=random.Random(0))

    assert picked is not None
    assert picked.worker_id == chosen


def test_equals_are_chosen_at_random() -> None:
    rng = random.Random(0)
    equals = [candidate("a"), candidate("b"), candidate("c", in_flight=1)]

    names = {picked.worker_id for _ in range(50) if (picked := choose_prefill_worker(equals, prompt_tokens=9, rng=rng))}

    assert names == {"a", "b"}


def test_nobody_is_chosen_of_nobody() -> None:
    assert choose_prefill_worker([], prompt_tokens=9, rng=random.Random(0)) is None
