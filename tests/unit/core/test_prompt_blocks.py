import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.prefix_keys import local_between, next_key, prefix_keys
from kvmesh.core.prompt_blocks import PromptBlocks

LOCAL = (15310707395893867146, 15292316782987903195, 5532946206955930018, 14928757266181269122)
SEQUENCE = (15310707395893867146, 13769157705258532664, 11879827756109914528, 3888788807566526800)
U64 = st.integers(0, 2**64 - 1)


def tokens(count: int) -> npt.NDArray[np.uint32]:
    return np.arange(count, dtype=np.uint32)


def test_blocks_of_tokens_are_the_sequence_hashes_of_the_field() -> None:
    blocks = PromptBlocks.of_tokens(tokens(70), 16)

    assert (len(blocks), blocks.block_size, blocks.local) == (4, 16, LOCAL)
    assert tuple(blocks) == SEQUENCE
    assert blocks[1:3] == SEQUENCE[1:3]


def test_lora_namespace_and_multimodal_hashes_are_part_of_the_blocks() -> None:
    both = PromptBlocks.of_tokens(tokens(4), 4, lora="adapter-a", cache_namespace="tenant-a")
    image = PromptBlocks.of_tokens(tokens(4), 2, multimodal={0: [42]})

    assert both.local == (8269515957840517240,)
    assert image.local == (6100948656312251355, 10731123482949079648)


@pytest.mark.parametrize("at", [3, 0, -1, -4, 2])
def test_one_block_is_chained_without_the_rest(at: int) -> None:
    blocks = PromptBlocks.of_local(LOCAL, 16)

    assert blocks[at] == SEQUENCE[at]
    assert blocks[0] == SEQUENCE[0]


@pytest.mark.parametrize("at", [4, -5])
def test_a_block_beyond_the_prompt_is_an_index_error(at: int) -> None:
    with pytest.raises(IndexError):
        PromptBlocks.of_local(LOCAL, 16)[at]


def test_blocks_are_equal_to_the_tuple_of_their_sequence_hashes() -> None:
    of_local, of_sequence = PromptBlocks.of_local(LOCAL, 16), PromptBlocks.of_sequence(SEQUENCE, 16)

    assert of_local == SEQUENCE
    assert of_sequence == SEQUENCE
    assert of_local == of_sequence == PromptBlocks.of_tokens(tokens(64), 16)
    assert {of_local: 1}[SEQUENCE] == 1  # type: ignore[index]  # equal keys of another type
    assert of_local != PromptBlocks.of_local(LOCAL[:3], 16)
    assert of_local != SEQUENCE[:3]
    assert of_local != list(SEQUENCE)


def test_blocks_known_by_sequence_alone_have_no_local_hashes() -> None:
    blocks = PromptBlocks.of_sequence(SEQUENCE, 16)

    assert blocks.local is None
    assert blocks.keys == list(SEQUENCE)
    assert blocks.key_view is None


def test_a_prompt_shorter_than_a_block_has_none() -> None:
    for blocks in (PromptBlocks.of_tokens(tokens(15), 16), PromptBlocks.of_local((), 16)):
        assert (len(blocks), tuple(blocks), blocks.local, blocks.keys) == (0, (), (), [])
        assert not blocks
        assert blocks == ()


def test_later_changes_of_the_tokens_do_not_show() -> None:
    given_tokens = tokens(64)

    blocks = PromptBlocks.of_tokens(given_tokens, 16)
    given_tokens[:] = 0

    assert tuple(blocks) == SEQUENCE


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_a_local_hash_outside_u64_is_refused(bad: int) -> None:
    with pytest.raises(FixRequestError) as caught:
        PromptBlocks.of_local([1, bad], 16)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "local")


@given(
    words=st.lists(st.integers(0, 2**32 - 1), max_size=60), size=st.integers(1, 9), reads=st.lists(st.integers(0, 59))
)
@settings(max_examples=60)
def test_blocks_equal_the_chain_in_whatever_order_they_are_read(words: list[int], size: int, reads: list[int]) -> None:
    array = np.array(words, dtype=np.uint32)
    chain = sequence_hashes(local_block_hashes(array, size))

    blocks = PromptBlocks.of_tokens(array, size)

    assert [blocks[at] for at in reads if at < len(blocks)] == [chain[at] for at in reads if at < len(chain)]
    assert tuple(blocks) == chain
    assert hash(blocks) == hash(chain)


@given(local=st.lists(U64, min_size=1, max_size=20), cut=st.integers(0, 20))
def test_keys_are_those_of_the_formula_and_continue_from_any_block(local: list[int], cut: int) -> None:
    def mix(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        return word ^ word >> 31

    mixed = [mix((block + at * 0x9E3779B97F4A7C15) % 2**64) for at, block in enumerate(local, start=1)]
    expected = [sum(mixed[: end + 1]) % 2**64 for end in range(len(local))]
    cut %= len(local)
    above = expected[cut - 1] if cut else 0

    keys = PromptBlocks.of_local(local, 16).keys

    assert keys == expected
    assert prefix_keys(np.array(local[cut:], dtype=np.uint64), after=above, depth=cut).tolist() == expected[cut:]
    assert next_key(above, local[cut], depth=cut) == expected[cut]
    assert local_between(above, expected[cut], depth=cut) == local[cut]


def test_keys_of_long_prompts_go_on_as_those_of_short_ones() -> None:
    local = np.arange(3000, dtype=np.uint64)

    whole, start = prefix_keys(local), prefix_keys(local[:500])

    assert whole[:500].tolist() == start.tolist()
    assert prefix_keys(local[1000:], after=int(whole[999]), depth=1000).tolist() == whole[1000:].tolist()
    assert next_key(int(whole[1998]), 1999, depth=1999) == whole[1999]


def test_equal_blocks_elsewhere_in_a_prompt_have_other_keys() -> None:
    one, other = PromptBlocks.of_local([1, 2, 3], 16), PromptBlocks.of_local([2, 1, 3], 16)
    repeated = PromptBlocks.of_local([7] * 2000, 16)

    assert not set(one.keys) & set(other.keys)
    assert len(set(repeated.keys)) == 2000
