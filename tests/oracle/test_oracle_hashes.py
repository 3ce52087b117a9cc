"""Block identity is the oracle's, bit for bit: events and indexes of both sides can be mixed."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.prompt_blocks import PromptBlocks

Ask = Callable[[str, list[Any]], list[Any]]

SEED = 20261121
CASES = 1_000
BLOCK_SIZES = (1, 2, 3, 4, 8, 16, 17, 32, 64, 128)
LORAS = (None, "", "adapter-a", "приложение", "b" * 200)
NAMESPACES = (None, "", "tenant-a", "租户")
MAX_TOKEN = 2**32 - 1
MAX_HASH = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt, and everything that its blocks' hashes depend on."""

    tokens: tuple[int, ...]
    block_size: int
    lora: str | None = None
    cache_namespace: str | None = None
    multimodal: tuple[tuple[int, ...], ...] | None = None
    """Per block, the partial one too: the hashes of what it shows."""

    def for_peer(self) -> list[Any]:
        return [list(self.tokens), self.block_size, self.lora, self.cache_namespace, self.multimodal]

    def for_us(self) -> dict[str, Any]:
        shown = None if self.multimodal is None else dict(enumerate(self.multimodal))
        return {
            "tokens": np.array(self.tokens, dtype=np.uint32),
            "block_size": self.block_size,
            "lora": self.lora,
            "cache_namespace": self.cache_namespace,
            "multimodal": shown,
        }


def random_case(rng: random.Random) -> Case:
    block_size = rng.choice(BLOCK_SIZES)
    length = rng.choice((0, 1, block_size - 1, block_size, block_size + 1, rng.randrange(20 * block_size)))
    highest = rng.choice((1, 31_999, MAX_TOKEN))
    tokens = tuple(rng.randint(0, highest) for _ in range(length))
    blocks = -(-length // block_size)
    multimodal = None
    if rng.random() < 0.4:
        multimodal = tuple(
            tuple(rng.randint(0, MAX_HASH) for _ in range(rng.choice((0, 0, 1, 2, 5)))) for _ in range(blocks)
        )
    return Case(tokens, block_size, rng.choice(LORAS), rng.choice(NAMESPACES), multimodal)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    rng = random.Random(SEED)
    return [random_case(rng) for _ in range(CASES)]


def test_local_hashes_agree_for_tokens_lora_namespace_and_multimodal(ask: Ask, cases: list[Case]) -> None:
    theirs = ask("local_hashes", [case.for_peer() for case in cases])

    for case, expected in zip(cases, theirs, strict=True):
        assert list(local_block_hashes(**case.for_us())) == expected, case


def test_sequence_hashes_agree_for_tokens_lora_namespace_and_multimodal(ask: Ask, cases: list[Case]) -> None:
    whole = [case for case in cases if len(case.tokens) >= case.block_size]
    theirs = ask("sequence_hashes", [case.for_peer() for case in whole])

    for case, expected in zip(whole, theirs, strict=True):
        assert list(sequence_hashes(local_block_hashes(**case.for_us()))) == expected, case
        assert list(PromptBlocks.of_tokens(**case.for_us())) == expected, case
    assert len(whole) > CASES // 2


def test_the_order_of_what_a_block_shows_is_nothing_and_how_often_is_something(ask: Ask) -> None:
    shown = [(1, 2, 3), (3, 1, 2), (1, 2, 3, 3)]
    cases = [Case(tuple(range(16)), 16, multimodal=(hashes,)) for hashes in shown]

    in_order, shuffled, doubled = (local_block_hashes(**case.for_us()) for case in cases)

    assert in_order == shuffled != doubled
    assert ask("local_hashes", [case.for_peer() for case in cases]) == [list(in_order), list(shuffled), list(doubled)]


def test_the_published_vectors_are_the_oracles(ask: Ask) -> None:
    cases = [Case(tuple(range(4)), 4), Case(tuple(range(4)), 4, "adapter-a", "tenant-a"), Case(tuple(range(64)), 64)]

    theirs = ask("local_hashes", [case.for_peer() for case in cases])

    assert theirs == [[9143094415614847814], [8269515957840517240], [3480597578098033343]]


def test_a_block_size_of_zero_has_no_blocks_where_the_oracle_refuses_it(ask: Ask) -> None:
    case = Case(tuple(range(4)), 0)

    assert local_block_hashes(**case.for_us()) == ()
    assert ask("local_hashes", [case.for_peer()]) == ["kv_block_size cannot be 0"]
