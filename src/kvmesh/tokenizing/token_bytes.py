"""Which bytes one token of a Hugging Face tokenizer stands for, wherever in a text it comes.

Three families: byte-level vocabularies write each byte as one printable character (GPT-2's table), byte-fallback ones
have tokens named `<0x0A>`, and all others are whole text, whose first space decoding drops at a text's beginning.
"""

import re

import tokenizers

from kvmesh.tokenizing.tokenizer import TokenText

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_table() -> dict[str, int]:
    """Return the byte of each character: the printable bytes stand for themselves, the others follow from U+0100 on."""
    table = {chr(byte): byte for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    others = (byte for byte in range(0x100) if chr(byte) not in table)
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_level_table()


class TokenBytes:
    """The tokens of one tokenizer, as bytes."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Read what kind of vocabulary it has."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        decoder = tokenizer.decoder
        self._is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    def token_text(self, token_id: int) -> TokenText:
        """See Tokenizer."""
        if (name := self._special.get(token_id)) is not None:
            return TokenText(name, None)
        name = self._tokenizer.id_to_token(token_id)
        if name is None:
            return TokenText("", None)
        text_bytes = self._bytes_of(name, token_id)
        return TokenText(text_bytes.decode("utf-8", "replace"), text_bytes)

    def _bytes_of(self, name: str, token_id: int) -> bytes:
        if self._is_byte_level:
            if all(character in _BYTE_OF for character in name):
                return bytes(_BYTE_OF[character] for character in name)
        elif found := _FALLBACK.fullmatch(name):
            return bytes((int(found[1], 16),))
        once = self._tokenizer.decode([token_id])
        return self._tokenizer.decode([token_id, token_id]).removeprefix(once).encode()
