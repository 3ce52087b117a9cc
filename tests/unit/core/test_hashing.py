import hashlib
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.hashing import (
    local_block_hashes,
    max_overlap_blocks,
    require_block_size,
    sequence_hashes,
    text_tokens,
)

PLAIN = 9143094415614847814  # tokens 0..3 in one block
FOUR_OF_16 = (15310707395893867146, 15292316782987903195, 5532946206955930018, 14928757266181269122)


def tokens(start: int, stop: int) -> npt.NDArray[np.uint32]:
    return np.arange(start, stop, dtype=np.uint32)


def test_xxh3_of_the_library_is_the_one_the_vectors_were_made_with() -> None:
    assert xxhash.xxh3_64_intdigest(b"test data", 1337) == 13226331709069118873


@pytest.mark.parametrize(
    ("start", "stop", "block_size", "expected"),
    [
        pytest.param(0, 4, 4, (PLAIN,), id="one block"),
        pytest.param(1, 9, 4, (14643705804678351452, 16777012769546811212), id="two blocks"),
        pytest.param(0, 64, 16, FOUR_OF_16, id="four blocks"),
        pytest.param(0, 64, 64, (3480597578098033343,), id="one long block"),
        pytest.param(0, 19, 16, FOUR_OF_16[:1], id="a partial block is dropped"),
        pytest.param(0, 15, 16, (), id="less than a block"),
        pytest.param(0, 64, 0, (), id="block size zero"),
        pytest.param(0, 64, -16, (), id="negative block size"),
        pytest.param(0, 0, 16, (), id="no tokens"),
    ],
)
def test_local_hashes_are_those_of_the_field(start: int, stop: int, block_size: int, expected: tuple[int, ...]) -> None:
    assert local_block_hashes(tokens(start, stop), block_size) == expected


@pytest.mark.parametrize(
    ("lora", "namespace", "expected"),
    [
        pytest.param("adapter-a", None, 6665157333201000639, id="lora"),
        pytest.param("", None, PLAIN, id="empty lora is none"),
        pytest.param(None, "tenant-a", 17009624042690211646, id="namespace"),
        pytest.param(None, "", PLAIN, id="empty namespace is none"),
        pytest.param("adapter-a", "tenant-a", 8269515957840517240, id="both"),
        pytest.param("ünï-适配", "ns/é", 17207757429232084402, id="names are UTF-8"),
    ],
)
def test_lora_and_namespace_change_the_seed(lora: str | None, namespace: str | None, expected: int) -> None:
    assert local_block_hashes(tokens(0, 4), 4, lora=lora, cache_namespace=namespace) == (expected,)


@pytest.mark.parametrize(
    ("multimodal", "first"),
    [
        pytest.param({0: [42]}, 6100948656312251355, id="one"),
        pytest.param({0: [7, 42]}, 14276852609691940483, id="two"),
        pytest.param({0: [42, 7]}, 14276852609691940483, id="in any order"),
        pytest.param({0: [42, 42]}, 12945423466412996532, id="twice the same counts twice"),
        pytest.param({0: []}, 10918435022357402928, id="none"),
        pytest.param({0: [42], 2: [9], 7: [9]}, 6100948656312251355, id="those of the partial block are ignored"),
    ],
)
def test_multimodal_hashes_belong_to_their_block_alone(multimodal: Mapping[int, Sequence[int]], first: int) -> None:
    assert local_block_hashes(tokens(0, 5), 2, multimodal=multimodal) == (first, 10731123482949079648)


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(np.arange(64, dtype=">u4"), id="big-endian"),
        pytest.param(np.arange(128, dtype=np.uint32)[:64], id="a view"),
        pytest.param(np.repeat(np.arange(64, dtype=np.uint32), 2)[::2], id="strided"),
        pytest.param(np.frombuffer(np.arange(64, dtype="<u4").tobytes(), dtype="<u4"), id="read-only"),
    ],
)
def test_memory_layout_does_not_change_the_hash(same: npt.NDArray[np.uint32]) -> None:
    assert local_block_hashes(same, 16) == FOUR_OF_16


@given(
    words=st.lists(st.integers(0, 2**32 - 1), max_size=40),
    block_size=st.integers(1, 9),
    lora=st.none() | st.text(st.characters(codec="utf-8"), max_size=5),
)
@settings(max_examples=60)
def test_local_hashes_equal_the_formula_block_by_block(words: list[int], block_size: int, lora: str | None) -> None:
    seed = 1337 + (xxhash.xxh3_64_intdigest(lora.encode(), 0) if lora else 0)
    blocks = [words[at : at + block_size] for at in range(0, len(words), block_size)]
    expected = [
        xxhash.xxh3_64_intdigest(struct.pack(f"<{block_size}I", *block), seed % 2**64)
        for block in blocks
        if len(block) == block_size
    ]

    assert local_block_hashes(np.array(words, dtype=np.uint32), block_size, lora=lora) == tuple(expected)


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        pytest.param(
            FOUR_OF_16,
            (15310707395893867146, 13769157705258532664, 11879827756109914528, 3888788807566526800),
            id="hashes",
        ),
        pytest.param([1, 2, 3], (1, 16740963408272063728, 5417695437591212399), id="small numbers"),
        pytest.param([11, 22, 33], (11, 750553365844651409, 3257565445809651757), id="other small numbers"),
        pytest.param([0, 2], (0, xxhash.xxh3_64_intdigest(struct.pack("<QQ", 0, 2), 1337)), id="zero is a hash"),
        pytest.param([], (), id="none"),
    ],
)
def test_sequence_hashes_are_those_of_the_field(local: Sequence[int], expected: tuple[int, ...]) -> None:
    assert sequence_hashes(local) == expected


@pytest.mark.parametrize("local", [[-1], [2**64], [1, 2**64]])
def test_a_local_hash_outside_u64_is_refused(local: list[int]) -> None:
    with pytest.raises(FixRequestError) as caught:
        sequence_hashes(local)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "local")


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(np.arange(4, dtype=np.int32), id="int32"),
        pytest.param(np.arange(4, dtype=np.uint64), id="uint64"),
        pytest.param(np.arange(4, dtype=np.float32), id="float32"),
        pytest.param(np.zeros((2, 2), dtype=np.uint32), id="two dimensions"),
        pytest.param(np.uint32(3), id="a scalar"),
        pytest.param([0, 1, 2, 3], id="a list"),
    ],
)
def test_tokens_that_are_no_vector_of_uint32_are_refused(bad: npt.NDArray[np.uint32]) -> None:
    with pytest.raises(FixRequestError) as caught:
        local_block_hashes(bad, 4)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "tokens")


@pytest.mark.parametrize("bad", [{-1: [42]}, {0: [-1]}, {0: [2**64]}, {9: [2**64]}])
def test_bad_multimodal_hashes_are_refused(bad: dict[int, list[int]]) -> None:
    with pytest.raises(FixRequestError) as caught:
        local_block_hashes(tokens(0, 4), 2, multimodal=bad)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "multimodal")


@pytest.mark.parametrize(
    ("prompt_tokens", "block_size", "expected"),
    [(0, 16, 0), (1, 16, 0), (16, 16, 0), (17, 16, 1), (32, 16, 1), (33, 16, 2), (64, 1, 63), (64, 0, 0), (-1, 16, 0)],
)
def test_overlap_leaves_at_least_one_token_to_compute(prompt_tokens: int, block_size: int, expected: int) -> None:
    assert max_overlap_blocks(prompt_tokens, block_size) == expected


def test_text_tokens_are_utf8_bytes() -> None:
    made = text_tokens("aé€")

    assert made.dtype == np.uint32
    assert made.tolist() == [0x61, 0xC3, 0xA9, 0xE2, 0x82, 0xAC]
    assert text_tokens("").tolist() == []


def test_text_tokens_of_text_that_is_no_unicode_are_refused() -> None:
    with pytest.raises(FixRequestError) as caught:
        text_tokens("\ud800")

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "text")


def test_hashing_leaves_the_tokens_alone() -> None:
    given_tokens = tokens(0, 64)
    before = hashlib.sha256(given_tokens.tobytes()).digest()

    local_block_hashes(given_tokens, 16, lora="a", multimodal={1: [3]})

    assert hashlib.sha256(given_tokens.tobytes()).digest() == before


def test_blocks_without_tokens_are_refused() -> None:
    require_block_size(1)
    for bad in (0, -1):
        with pytest.raises(FixRequestError) as caught:
            require_block_size(bad)
        assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "block_size")
