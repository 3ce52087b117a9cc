"""The byte tokenizer against the standard library's own idea of UTF-8."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.tokenizing.byte_tokenizer import ByteTokenizer
from kvmesh.tokenizing.tokenizer import Tokenizer


@given(st.text())
def test_tokens_are_the_utf8_bytes(text: str) -> None:
    token_ids = ByteTokenizer().encode(text)

    assert token_ids.dtype == np.uint32
    assert token_ids.tolist() == list(text.encode())


@given(st.binary(), st.lists(st.integers(1, 5)))
def test_any_bytes_decode_as_a_whole_would_with_one_piece_per_token(content: bytes, sizes: list[int]) -> None:
    detokenizer = ByteTokenizer().detokenizer()
    pieces: list[str] = []
    rest = list(content)

    for size in [*sizes, len(rest)]:
        pieces += detokenizer.push(rest[:size])
        rest = rest[size:]

    assert len(pieces) == len(content)
    assert "".join(pieces) + detokenizer.flush() == content.decode(errors="replace")


def test_a_character_comes_with_its_last_byte() -> None:
    pieces = ByteTokenizer().detokenizer().push(list("a🙂é".encode()))

    assert pieces == ["a", "", "", "", "🙂", "", "é"]


def test_flush_shows_an_incomplete_character_as_a_replacement() -> None:
    detokenizer = ByteTokenizer().detokenizer()

    assert detokenizer.push([0xF0, 0x9F]) == ["", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push([ord("a")]) == ["a"]


@pytest.mark.parametrize(
    ("token_ids", "pieces"),
    [([65, 300, 66], ["A", "\ufffd", "B"]), ([0xC3, 300], ["", "\ufffd\ufffd"])],
)
def test_an_id_that_is_no_byte_becomes_a_replacement(token_ids: list[int], pieces: list[str]) -> None:
    assert ByteTokenizer().detokenizer().push(token_ids) == pieces


def test_printable_ids_decode_to_printable_ascii() -> None:
    tokenizer = ByteTokenizer()

    text = "".join(tokenizer.detokenizer().push(range(*tokenizer.printable_ids)))

    assert len(text) == 95
    assert text.isprintable()
    assert text.isascii()


def test_chat_is_one_line_per_message() -> None:
    prompt = ByteTokenizer().render_chat([("system", "Be brief."), ("user", "Hi")])

    assert prompt == "system: Be brief.\nuser: Hi\n"


def test_it_is_a_tokenizer_without_limits_of_its_own() -> None:
    tokenizer: Tokenizer = ByteTokenizer()

    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.max_context_tokens) == (256, (), None)
