"""What a prompt is before any worker sees it."""

from typing import NoReturn

import pytest

from kvmesh.core.errors import FixRequestError
from kvmesh.services.prompts import TOKENS, prepare_prompt
from kvmesh.tokenizing.byte_tokenizer import ByteTokenizer
from kvmesh.v1 import generation_pb2


class NeverEncodes(ByteTokenizer):
    def encode(self, text: str, *, add_special_tokens: bool = True) -> NoReturn:
        raise AssertionError("it was tokenised")


async def test_text_that_no_context_could_hold_is_refused_before_it_is_tokenised() -> None:
    prompt = generation_pb2.Prompt(text="x" * 25_601)

    with pytest.raises(FixRequestError, match="25601 characters leave no room in a context of 100 tokens") as refused:
        await prepare_prompt(prompt, tokenizer=NeverEncodes(), accepts=frozenset({TOKENS}), max_context_tokens=100)

    assert refused.value.field == "prompt"


@pytest.mark.parametrize("characters", [10, 25_600])
async def test_text_that_may_fit_is_tokenised(characters: int) -> None:
    prompt = generation_pb2.Prompt(text="x" * characters)

    prepared = await prepare_prompt(
        prompt, tokenizer=ByteTokenizer(), accepts=frozenset({TOKENS}), max_context_tokens=100
    )

    assert prepared.prompt_tokens >= characters
