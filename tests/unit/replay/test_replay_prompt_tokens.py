"""From hash_ids to prompts: the same tokens for equal blocks, other tokens for any other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.replay.prompt_tokens import prompt_tokens
from kvmesh.tokenizing.byte_tokenizer import ByteTokenizer

BLOCK = 512
HASH_IDS = st.integers(min_value=0, max_value=2**64 - 1)


def spelled(hash_id: int) -> bytes:
    """Return the eleven tokens that spell an id, least significant digit first."""
    return bytes(32 + hash_id // 64**place % 64 for place in range(11))


@pytest.mark.parametrize("hash_id", [0, 1, 63, 64, 182_789, 2**63, 2**64 - 1])
def test_a_block_repeats_its_hash_id_from_end_to_end(hash_id: int) -> None:
    tokens = prompt_tokens([hash_id], BLOCK)

    assert tokens == (spelled(hash_id) * 47)[:BLOCK]


@given(HASH_IDS, HASH_IDS)
def test_two_blocks_share_every_token_or_differ_within_any_eleven(one: int, other: int) -> None:
    left, right = prompt_tokens([one], BLOCK), prompt_tokens([other], BLOCK)

    pieces = [(left[at : at + 11], right[at : at + 11]) for at in range(BLOCK - 10)]
    assert all((mine == theirs) == (one == other) for mine, theirs in pieces)


@given(st.lists(HASH_IDS, min_size=1, max_size=4), st.lists(HASH_IDS, max_size=4), st.integers(1, BLOCK))
def test_prompts_with_a_prefix_in_common_begin_with_the_same_tokens(
    shared: list[int], rest: list[int], last_tokens: int
) -> None:
    hash_ids = [*shared, *rest]
    length = (len(hash_ids) - 1) * BLOCK + last_tokens

    tokens = prompt_tokens(hash_ids, length)

    assert len(tokens) == length
    known = min(len(shared) * BLOCK, length)
    assert tokens[:known] == prompt_tokens(shared, len(shared) * BLOCK)[:known]


@given(st.lists(HASH_IDS, min_size=1, max_size=4))
def test_every_token_is_one_that_a_byte_tokenizer_prints(hash_ids: list[int]) -> None:
    tokens = prompt_tokens(hash_ids, len(hash_ids) * BLOCK)

    low, high = ByteTokenizer().printable_ids
    assert low <= min(tokens)
    assert max(tokens) < high
