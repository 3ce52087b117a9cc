"""An engine's own block hashes, translated into ours."""

from typing import Any

import numpy as np
import pytest

from kvmesh.core.foreign_blocks import (
    ForeignBlocks,
    ForeignCleared,
    ForeignHash,
    ForeignRemoved,
    ForeignStored,
    Place,
    Refusal,
)
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent

# Hashes of tokens 0..63 in blocks of 16, from the field's reference implementation.
LOCAL = (15310707395893867146, 15292316782987903195, 5532946206955930018, 14928757266181269122)
SEQUENCE = (15310707395893867146, 13769157705258532664, 11879827756109914528, 3888788807566526800)


def stored(
    *block_hashes: ForeignHash, tokens: range, parent: ForeignHash | None = None, **fields: Any
) -> ForeignStored:
    token_ids = np.array(tokens, dtype=np.uint32)
    return ForeignStored(block_hashes=block_hashes, parent=parent, token_ids=token_ids, **{"block_size": 16, **fields})


def removed(*block_hashes: ForeignHash, **fields: Any) -> ForeignRemoved:
    return ForeignRemoved(block_hashes=block_hashes, **fields)


@pytest.fixture
def blocks() -> ForeignBlocks:
    return ForeignBlocks(block_size=16, lora_names={3: "adapter-a"})


def names(event: KvEvent | Refusal | None) -> tuple[int, ...]:
    assert isinstance(event, BlocksStored | BlocksRemoved)
    return event.block_hashes


def test_blocks_are_named_by_their_tokens_and_their_parents(blocks: ForeignBlocks) -> None:
    first = blocks.translate(stored(900, 901, tokens=range(32)))
    second = blocks.translate(stored(b"x", b"y", tokens=range(32, 64), parent=901))

    assert first == BlocksStored(None, SEQUENCE[:2], LOCAL[:2])  # type: ignore[arg-type]  # plain ints are hashes
    assert second == BlocksStored(SEQUENCE[1], SEQUENCE[2:], LOCAL[2:])  # type: ignore[arg-type]  # as above


def test_removed_blocks_are_named_as_they_were_stored(blocks: ForeignBlocks) -> None:
    blocks.translate(stored(900, 901, 902, tokens=range(48)))

    gone = blocks.translate(removed(902, 777, 901))
    again = blocks.translate(removed(902))

    assert names(gone) == (SEQUENCE[2], SEQUENCE[1])
    assert again is None
    assert len(blocks) == 1


def test_block_of_which_a_copy_is_left_is_not_removed(blocks: ForeignBlocks) -> None:
    first = blocks.translate(stored(900, tokens=range(16)))
    copy = blocks.translate(stored(900, tokens=range(16)))
    under_another_hash = blocks.translate(stored(950, tokens=range(16)))

    removals = [blocks.translate(removed(block)) for block in (900, 950, 900)]

    assert (names(first), copy, under_another_hash) == (SEQUENCE[:1], None, None)
    assert removals == [None, None, BlocksRemoved(SEQUENCE[:1])]  # type: ignore[arg-type]  # plain ints are hashes


def test_run_that_begins_with_known_blocks_is_told_whole(blocks: ForeignBlocks) -> None:
    blocks.translate(stored(900, tokens=range(16)))

    assert names(blocks.translate(stored(900, 901, tokens=range(32)))) == SEQUENCE[:2]


def test_cleared_cache_forgets_every_name(blocks: ForeignBlocks) -> None:
    blocks.translate(stored(900, tokens=range(16)))

    assert blocks.translate(ForeignCleared()) == CacheCleared()
    assert blocks.translate(stored(901, tokens=range(16, 32), parent=900)) is Refusal.UNKNOWN_PARENT
    assert len(blocks) == 0


@pytest.mark.parametrize(
    ("event", "refusal"),
    [
        (stored(1, tokens=range(8), block_size=8), Refusal.BLOCK_SIZE),
        (stored(1, 2, tokens=range(16)), Refusal.TOKENS),
        (stored(tokens=range(0)), Refusal.TOKENS),
        (stored(1, tokens=range(16), parent=99), Refusal.UNKNOWN_PARENT),
        (stored(1, tokens=range(16), lora_id=4), Refusal.UNKNOWN_LORA),
        (stored(1, tokens=range(16), place=Place(medium="CPU")), Refusal.OTHER_MEDIUM),
        (stored(1, tokens=range(16), place=Place(kind="sliding_window")), Refusal.OTHER_GROUP),
        (removed(900, place=Place(medium="CPU")), Refusal.OTHER_MEDIUM),
        (removed(900, place=Place(group=1)), Refusal.OTHER_GROUP),
    ],
)
def test_what_says_nothing_to_the_index_is_refused_and_changes_nothing(
    blocks: ForeignBlocks, event: Any, refusal: Refusal
) -> None:
    blocks.translate(stored(900, tokens=range(16), place=Place(group=0)))

    assert blocks.translate(event) is refusal
    assert len(blocks) == 1


def test_one_group_of_full_attention_counts(blocks: ForeignBlocks) -> None:
    window = blocks.translate(stored(900, tokens=range(16), place=Place(group=0, kind="sliding_window")))
    full = blocks.translate(stored(900, tokens=range(16), place=Place(group=1, kind="full_attention")))
    second_full = blocks.translate(stored(900, tokens=range(16), place=Place(group=2, kind="full_attention")))
    of_the_window = blocks.translate(removed(900, place=Place(group=0)))
    of_the_full = blocks.translate(removed(900, place=Place(group=1)))

    assert (window, second_full, of_the_window) == (Refusal.OTHER_GROUP,) * 3
    assert names(full) == names(of_the_full) == SEQUENCE[:1]


def test_names_are_bounded() -> None:
    blocks = ForeignBlocks(block_size=16, max_blocks=2)
    blocks.translate(stored(900, tokens=range(16)))

    assert blocks.translate(stored(901, 902, tokens=range(16, 48), parent=900)) is Refusal.FULL
    assert names(blocks.translate(stored(901, tokens=range(16, 32), parent=900))) == SEQUENCE[1:2]


# Hashes of tokens 0..3 in one block of 4, with the adapter, the namespace and both; from the same reference.
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, 9143094415614847814),
        ({"lora": "adapter-a"}, 6665157333201000639),
        ({"lora_id": 3}, 6665157333201000639),
        ({"lora": "adapter-a", "extra_keys": (("adapter-a",),)}, 6665157333201000639),
        ({"extra_keys": (("tenant-a",),)}, 17009624042690211646),
        ({"lora": "adapter-a", "extra_keys": (("adapter-a", "tenant-a"),)}, 8269515957840517240),
    ],
)
def test_adapter_and_cache_salt_are_part_of_the_name(fields: dict[str, Any], name: int) -> None:
    blocks = ForeignBlocks(block_size=4, lora_names={3: "adapter-a"})

    assert names(blocks.translate(stored(1, tokens=range(4), block_size=4, **fields))) == (name,)


def test_cache_salt_holds_for_all_that_follows() -> None:
    apart, together = ForeignBlocks(block_size=4), ForeignBlocks(block_size=4)
    apart.translate(stored(1, tokens=range(4), block_size=4, extra_keys=(("tenant-a",),)))
    follower = apart.translate(stored(2, tokens=range(4, 8), parent=1, block_size=4))

    whole = together.translate(stored(1, 2, tokens=range(8), block_size=4, extra_keys=(("tenant-a",), ())))

    assert names(whole)[1:] == names(follower)


# Hashes of tokens 0..3 in blocks of 2 with content 42 in the first; from the same reference.
@pytest.mark.parametrize("key", [42, f"{42:016x}", f"{42:016x}" + "f" * 48])
def test_content_of_a_block_is_part_of_its_name(key: Any) -> None:
    blocks = ForeignBlocks(block_size=2)

    event = blocks.translate(stored(1, 2, tokens=range(4), block_size=2, extra_keys=((key,), ())))

    assert isinstance(event, BlocksStored)
    assert event.local_hashes == (6100948656312251355, 10731123482949079648)
