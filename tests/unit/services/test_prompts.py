"""What a prompt is before any worker sees it."""

import asyncio
import threading
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh.core.errors import FixRequestError
from kvmesh.services.prompts import TOKENS, Tokenising, prepare_prompt
from kvmesh.tokenizing.byte_tokenizer import ByteTokenizer
from kvmesh.v1 import generation_pb2


class NeverEncodes(ByteTokenizer):
    def encode(self, text: str, *, add_special_tokens: bool = True) -> NoReturn:
        raise AssertionError("it was tokenised")


@pytest.fixture
def tokenising() -> Iterator[Tokenising]:
    tokenising = Tokenising()
    yield tokenising
    tokenising.close()


async def test_text_that_no_context_could_hold_is_refused_before_it_is_tokenised(tokenising: Tokenising) -> None:
    prompt = generation_pb2.Prompt(text="x" * 25_601)

    with pytest.raises(FixRequestError, match="25601 characters leave no room in a context of 100 tokens") as refused:
        await prepare_prompt(
            prompt,
            tokenizer=NeverEncodes(),
            tokenising=tokenising,
            accepts=frozenset({TOKENS}),
            max_context_tokens=100,
        )

    assert refused.value.field == "prompt"


@pytest.mark.parametrize("characters", [10, 25_600])
async def test_text_that_may_fit_is_tokenised(tokenising: Tokenising, characters: int) -> None:
    prompt = generation_pb2.Prompt(text="x" * characters)

    prepared = await prepare_prompt(
        prompt,
        tokenizer=ByteTokenizer(),
        tokenising=tokenising,
        accepts=frozenset({TOKENS}),
        max_context_tokens=100,
    )

    assert prepared.prompt_tokens >= characters


class SaysWhere(ByteTokenizer):
    """Remembers which threads it tokenised in."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[threading.Thread] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> npt.NDArray[np.uint32]:
        self.threads.append(threading.current_thread())
        return super().encode(text, add_special_tokens=add_special_tokens)


async def test_long_texts_are_tokenised_off_the_loop_in_threads_that_end_with_their_owner(
    tokenising: Tokenising,
) -> None:
    tokenizer = SaysWhere()
    for characters in (10, 10_000):
        prompt = generation_pb2.Prompt(text="x" * characters)
        await prepare_prompt(prompt, tokenizer=tokenizer, tokenising=tokenising, accepts=frozenset({TOKENS}))
    short, long = tokenizer.threads

    tokenising.close()
    await asyncio.to_thread(long.join, 10.0)

    assert short is threading.current_thread()
    assert long is not short
    assert not long.is_alive()
