"""Single tokens as text and bytes: joined, the bytes of a text's tokens are the text."""

from collections.abc import Callable

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from kvmesh.testing.tiny_tokenizer import EOS_TOKEN, write_tiny_tokenizer
from kvmesh.tokenizing.byte_tokenizer import ByteTokenizer
from kvmesh.tokenizing.folder_tokenizer import FolderTokenizer
from kvmesh.tokenizing.token_bytes import TokenBytes
from kvmesh.tokenizing.tokenizer import TokenText

TEXT = "Tell me a joke:\n\tGrüße, 世界 🙂!"


def byte_fallback_tokenizer() -> tokenizers.Tokenizer:
    """A vocabulary in the manner of SentencePiece: spaces are a sign, what is unknown is spelt in bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "T", "e", "l", "▁m", "▁a", "▁jo", "ke"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_piece_tokenizer() -> tokenizers.Tokenizer:
    words = {"[UNK]": 0, "play": 1, "##ing": 2, "field": 3}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def read(tokenizer: tokenizers.Tokenizer, name: str) -> TokenText:
    token_id = tokenizer.token_to_id(name)
    assert token_id is not None
    return TokenBytes(tokenizer).token_text(token_id)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> FolderTokenizer:
    return FolderTokenizer.load(write_tiny_tokenizer(tmp_path_factory.mktemp("models") / "tiny"))


def test_the_bytes_of_byte_level_tokens_are_the_text(tiny: FolderTokenizer) -> None:
    tokens = [tiny.token_text(token) for token in tiny.encode(TEXT, add_special_tokens=False).tolist()]

    assert b"".join(token.text_bytes or b"" for token in tokens) == TEXT.encode()
    assert any(token.text == "\ufffd" for token in tokens), "a character is split between tokens"


def test_a_special_token_has_a_name_and_no_bytes(tiny: FolderTokenizer) -> None:
    (eos,) = tiny.eos_token_ids

    assert tiny.token_text(eos) == (EOS_TOKEN, None)


def test_an_id_beyond_the_vocabulary_is_nothing(tiny: FolderTokenizer) -> None:
    assert tiny.token_text(1_000_000) == ("", None)


def test_byte_fallback_tokens_keep_their_spaces_and_their_bytes() -> None:
    tokenizer = byte_fallback_tokenizer()
    token_text = TokenBytes(tokenizer).token_text

    tokens = [token_text(token) for token in tokenizer.encode(TEXT).ids]

    assert b"".join(token.text_bytes or b"" for token in tokens) == f" {TEXT}".encode()
    assert read(tokenizer, "▁jo") == (" jo", b" jo")
    assert read(tokenizer, "<0xE4>") == ("\ufffd", b"\xe4")


@pytest.mark.parametrize(("name", "expected"), [("play", " play"), ("##ing", "ing"), ("field", " field")])
def test_word_pieces_are_read_as_within_a_text(name: str, expected: str) -> None:
    assert read(word_piece_tokenizer(), name).text == expected


def test_an_added_token_that_is_not_special_is_text() -> None:
    tokenizer = byte_fallback_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])

    assert read(tokenizer, "<think>") == ("<think>", b"<think>")


@pytest.mark.parametrize(
    ("token_id", "expected"),
    [(0x41, ("A", b"A")), (0xE4, ("\ufffd", b"\xe4")), (1_000, ("\ufffd", "\ufffd".encode()))],
)
def test_a_byte_is_itself(token_id: int, expected: tuple[str, bytes]) -> None:
    token_text: Callable[[int], object] = ByteTokenizer().token_text

    assert token_text(token_id) == expected
