"""Log probabilities through a whole mesh around a real model, by the official client and by gRPC."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest
import pytest_asyncio

from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.mesh import open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.testing.tiny_model import write_tiny_model
from kvmesh.v1 import decode_worker_pb2, decode_worker_pb2_grpc, frontend_pb2, generation_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOUND_S = 20.0
TOP = 4
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Tell me a joke about a queue."}],
    "temperature": 0,
    "max_tokens": 12,
    "logprobs": True,
    "top_logprobs": TOP,
    "extra_body": {"ignore_eos": True},
}
COMPLETION: dict[str, Any] = {
    "model": "tiny",
    "prompt": "Every wait is bounded and every decision",
    "temperature": 1.3,
    "seed": 11,
    "max_tokens": 24,
    "logprobs": 3,
    "extra_body": {"ignore_eos": True},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    """A mesh with a processor of its own, so that what is known of a token crosses every hop there is."""
    model = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    async with running_mesh(
        engine__name="numpy_llama",
        engine__model=model,
        engine__options__dtype="float64",
        mesh__processor="separate",
        remote_prefill__min_uncached_tokens=16,
    ) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def client(mesh: Mesh) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://{mesh.http_address}/v1",
        api_key="unused",
        max_retries=0,
        timeout=BOUND_S,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


async def test_a_chats_tokens_are_its_text_and_the_greedy_one_is_the_likeliest(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(**CHAT)

    (choice,) = reply.choices
    assert choice.logprobs is not None
    tokens = choice.logprobs.content
    assert tokens
    assert b"".join(bytes(token.bytes or b"") for token in tokens).decode(errors="replace") == choice.message.content
    for token in tokens:
        assert len(token.top_logprobs) == TOP
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
        assert sum(math.exp(likely.logprob) for likely in token.top_logprobs) <= 1


async def test_a_streamed_chat_tells_the_same_with_each_token(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(**CHAT)
    chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT, stream=True)]

    expected = whole.choices[0].logprobs
    streamed = [chunk.choices[0] for chunk in chunks]
    entries = [entry for choice in streamed if choice.logprobs for entry in choice.logprobs.content or []]
    assert expected is not None
    assert entries == expected.content
    assert "".join(choice.delta.content or "" for choice in streamed) == whole.choices[0].message.content
    assert all(len(choice.logprobs.content or []) == 1 for choice in streamed if choice.logprobs)
    assert streamed[-1].finish_reason == "length"


async def test_a_chat_may_ask_for_the_tokens_own_alone_or_for_none(client: openai.AsyncOpenAI) -> None:
    alone = await client.chat.completions.create(**{**CHAT, "top_logprobs": None})
    none = await client.chat.completions.create(**{**CHAT, "top_logprobs": None, "logprobs": False})

    assert alone.choices[0].logprobs is not None
    assert alone.choices[0].logprobs.content
    assert all(token.top_logprobs == [] for token in alone.choices[0].logprobs.content)
    assert none.choices[0].logprobs is None
    assert none.choices[0].message.content == alone.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
async def test_a_completions_tokens_are_where_their_offsets_say(client: openai.AsyncOpenAI, stream: bool) -> None:
    if stream:
        chunks = [chunk async for chunk in await client.completions.create(**COMPLETION, stream=True)]
    else:
        chunks = [await client.completions.create(**COMPLETION)]

    text = "".join(chunk.choices[0].text for chunk in chunks)
    known = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    tokens = [token for each in known for token in each.tokens or []]
    offsets = [offset for each in known for offset in each.text_offset or []]
    likely = [top for each in known for top in each.top_logprobs or []]
    own = [logprob for each in known for logprob in each.token_logprobs or []]
    # A part of a character comes with the text of a later token: the places of whole tokens after whole ones are exact.
    places = zip(["", *tokens], tokens, offsets, strict=False)
    whole = [(token, offset) for before, token, offset in places if "\ufffd" not in before + token]
    assert len(whole) > 5
    assert all(text.startswith(token, offset) for token, offset in whole)
    assert all(top[token] >= logprob for token, logprob, top in zip(tokens, own, likely, strict=True))
    assert all(1 <= len(top) <= 3 + 1 for top in likely)
    assert any(top[token] < max(top.values()) for token, top in zip(tokens, likely, strict=True)), "it was drawn"


@pytest.mark.parametrize("stream", [False, True])
async def test_text_cut_by_a_stop_string_has_no_log_probabilities_after_it(
    client: openai.AsyncOpenAI, mesh: Mesh, stream: bool
) -> None:
    baseline = await read_baseline(mesh)
    free = await client.completions.create(**COMPLETION)
    text = free.choices[0].text
    stop = text[9:14]
    expected = text[: text.index(stop)]
    asked = {**COMPLETION, "stop": ["no such text", stop]}

    if stream:
        chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
    else:
        chunks = [await client.completions.create(**asked)]

    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"
    known = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    offsets = [offset for each in known for offset in each.text_offset or []]
    tokens = [token for each in known for token in each.tokens or []]
    assert offsets
    assert max(offsets) < len(expected)
    assert len("".join(tokens)) >= len(expected)
    await wait_for_baseline(mesh, baseline)


async def test_grpc_clients_read_them_in_the_chunks(mesh: Mesh) -> None:
    sampling = generation_pb2.SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
    request = frontend_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="The prefill worker"), sampling=sampling)

    async with open_frontend(mesh) as frontend:
        responses = [response async for response in frontend.Generate(request, timeout=BOUND_S)]

    chunks = [response.chunk for response in responses if response.HasField("chunk")]
    token_ids = [token for chunk in chunks for token in chunk.token_ids]
    known = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.token.token_id for entry in known] == token_ids
    assert len(token_ids) == 6
    assert all(len(entry.top) == 2 for entry in known)


async def test_a_worker_called_on_its_own_tells_ids_and_numbers(mesh: Mesh) -> None:
    topology = await mesh.gateway.refreshed_topology()
    address = next(worker.address for worker in topology.workers if worker.role == "decode")
    sampling = generation_pb2.SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
    request = decode_worker_pb2.DecodeRequest(
        request_id="on-its-own",
        attempt=1,
        token_ids=generation_pb2.TokenIds(token_ids=range(5, 25)),
        sampling=sampling,
    )

    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(BOUND_S):
        call = decode_worker_pb2_grpc.DecodeWorkerStub(channel).Generate(
            decode_worker_pb2.DecodeWorkerGenerateRequest(request=request), timeout=BOUND_S
        )
        chunks = [response.chunk async for response in call if response.HasField("chunk")]

    token_ids = [token for chunk in chunks for token in chunk.token_ids]
    known = [entry for chunk in chunks for entry in chunk.logprobs]
    assert len(token_ids) == 6
    assert [entry.token.token_id for entry in known] == [entry.top[0].token_id for entry in known] == token_ids
