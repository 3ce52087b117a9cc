"""The official OpenAI client against a whole mesh."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.held_engine import held_plan
from kvmesh.testing.mesh import read_baseline, running_mesh, wait_for_baseline
from kvmesh.v1 import router_pb2
from kvmesh.wire.routing import query_from_proto

BLOCK_TOKENS = 16
SIMULATED: dict[str, Any] = {
    "engine__name": "simulated",
    "engine__speedup": 0,
    "engine__options__block_size": str(BLOCK_TOKENS),
    "remote_prefill__min_uncached_tokens": 32,
}
QUESTION = "What is a service mesh, in one sentence, and why would anybody want to have one of them?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
RENDERED = f"user: {QUESTION}\n"
"""What the byte tokenizer's template makes of it; a token is a byte."""
PROMPT_TOKENS = len(RENDERED)
CAP_TOKENS = (PROMPT_TOKENS - 1) // BLOCK_TOKENS * BLOCK_TOKENS
BOUND_S = 15.0


@asynccontextmanager
async def openai_client(mesh: Mesh) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://{mesh.http_address}/v1",
        api_key="unused",
        max_retries=0,
        timeout=BOUND_S,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


async def wait_indexed(mesh: Mesh) -> None:
    """Wait until the router has heard that a worker caches the rendered question."""
    asked = router_pb2.RoutingQuery(model="simulated")
    asked.token_ids.token_ids.extend(RENDERED.encode())
    query = query_from_proto(asked, block_sizes={BLOCK_TOKENS})
    router = mesh.gateway.router
    async with asyncio.timeout(BOUND_S):
        while not any(blocks * BLOCK_TOKENS >= CAP_TOKENS for blocks in router.overlaps(query).values()):
            await router.changed()


async def test_a_chat_streams_its_role_its_text_its_end_and_its_usage() -> None:
    async with running_mesh(**SIMULATED) as mesh, openai_client(mesh) as client:
        stream = await client.chat.completions.create(
            model="simulated", messages=MESSAGES, stream=True, max_tokens=9, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]

        *spoken, last = chunks
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
        assert spoken[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in spoken)
        assert len(text) == 9
        assert [chunk.choices[0].finish_reason for chunk in spoken if chunk.choices[0].finish_reason] == ["length"]
        assert spoken[-1].choices[0].finish_reason == "length"
        assert all(chunk.usage is None for chunk in spoken)
        assert last.choices == []
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (PROMPT_TOKENS, 9)
        assert last.usage.total_tokens == PROMPT_TOKENS + 9


@pytest.mark.parametrize("prefill", [0, 1], ids=["aggregated", "disaggregated"])
async def test_the_cached_tokens_that_a_chat_reports_are_those_of_the_worker(prefill: int) -> None:
    async with running_mesh(mesh__prefill=prefill, **SIMULATED) as mesh, openai_client(mesh) as client:
        baseline = await read_baseline(mesh)
        replies = []
        for _ in range(2):
            replies.append(
                await client.chat.completions.create(
                    model="simulated", messages=MESSAGES, max_tokens=5, temperature=0, seed=3
                )
            )
            await wait_indexed(mesh)

        cached = [reply.usage.prompt_tokens_details.cached_tokens for reply in replies]  # type: ignore[union-attr]  # a missing one fails the test
        assert cached == [0, CAP_TOKENS]
        assert replies[0].choices[0].message.content == replies[1].choices[0].message.content
        assert replies[0].choices[0].message.role == "assistant"
        assert replies[0].choices[0].finish_reason == "length"
        assert replies[0].object == "chat.completion"
        await wait_for_baseline(mesh, baseline)


async def test_a_completion_is_the_same_whole_and_streamed() -> None:
    asked: dict[str, Any] = {"model": "simulated", "prompt": QUESTION, "max_tokens": 12, "temperature": 0, "seed": 5}
    async with running_mesh(**SIMULATED) as mesh, openai_client(mesh) as client:
        whole = await client.completions.create(**asked)
        streamed = [chunk async for chunk in await client.completions.create(**asked, stream=True)]

        assert whole.object == "text_completion"
        assert len(whole.choices[0].text) == 12
        assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == len(QUESTION)


async def test_a_stop_string_ends_the_text_before_it_and_frees_the_engine() -> None:
    asked: dict[str, Any] = {"model": "simulated", "prompt": QUESTION, "temperature": 0, "seed": 5}
    async with running_mesh(**SIMULATED) as mesh, openai_client(mesh) as client:
        baseline = await read_baseline(mesh)
        text = (await client.completions.create(**asked, max_tokens=40)).choices[0].text
        stop = text[10:13]
        expected = text[: text.index(stop)]

        stopped = await client.completions.create(**asked, max_tokens=100_000, stop=[stop])
        streamed = [
            chunk
            async for chunk in await client.completions.create(**asked, max_tokens=100_000, stop=stop, stream=True)
        ]

        assert stopped.choices[0].text == expected
        assert stopped.choices[0].finish_reason == "stop"
        assert "".join(chunk.choices[0].text for chunk in streamed) == expected
        assert streamed[-1].choices[0].finish_reason == "stop"
        await wait_for_baseline(mesh, baseline)


async def test_the_model_is_listed_and_found_by_its_name() -> None:
    async with running_mesh(engine__model_name="org/tiny", **SIMULATED) as mesh, openai_client(mesh) as client:
        listed = [model async for model in client.models.list()]
        found = await client.models.retrieve("org/tiny")

        assert [model.id for model in listed] == ["org/tiny"]
        assert (found.id, found.object) == ("org/tiny", "model")


async def test_an_unknown_model_is_not_found() -> None:
    async with running_mesh(**SIMULATED) as mesh, openai_client(mesh) as client:
        with pytest.raises(openai.NotFoundError) as refused:
            await client.chat.completions.create(model="gpt-9", messages=MESSAGES)

        assert refused.value.code == "model_not_found"
        assert refused.value.param == "model"


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"messages": []}, "messages"), ({"max_tokens": 0}, "max_tokens"), ({"n": 99}, "n"), ({"top_p": 7}, "top_p")],
    ids=["no-messages", "no-tokens", "too-many-choices", "top-p-above-one"],
)
async def test_a_request_that_cannot_be_served_is_a_bad_request_that_names_the_field(
    changes: dict[str, Any], param: str
) -> None:
    async with running_mesh(**SIMULATED) as mesh, openai_client(mesh) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**{"model": "simulated", "messages": MESSAGES, **changes})

        assert refused.value.type == "invalid_request_error"
        assert refused.value.param == param


async def test_every_reply_carries_a_request_id() -> None:
    async with running_mesh(**SIMULATED) as mesh, openai_client(mesh) as client:
        raw = await client.completions.with_raw_response.create(model="simulated", prompt="hi", max_tokens=1)
        with pytest.raises(openai.NotFoundError) as refused:
            await client.completions.create(model="gpt-9", prompt="hi")
        whole = raw.parse()

        assert whole.id == f"cmpl-{raw.headers['x-request-id']}"
        assert refused.value.request_id
        assert refused.value.request_id != raw.headers["x-request-id"]


async def test_a_worker_that_is_lost_mid_stream_is_an_error_inside_the_iterator() -> None:
    plan, engines = held_plan(steps=3)
    async with running_mesh(plan=plan, mesh__decode=1, mesh__prefill=0) as mesh, openai_client(mesh) as client:
        stream = await client.completions.create(model="held", prompt="a b c d e f", stream=True)
        words = [(await anext(stream)).choices[0].text for _ in range(3)]
        engines["NODE1"].break_down()

        with pytest.raises(openai.APIError) as lost:
            words += [chunk.choices[0].text async for chunk in stream]

        assert words == ["a ", "b ", "c "]
        assert lost.value.code == "worker_lost"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": ""}]}, "messages"),
        ("completions", {"prompt": [1, 2, 3]}, "prompt"),
    ],
    ids=["messages-without-text", "tokens-for-workers-that-read-text"],
)
async def test_what_is_refused_behind_the_door_is_named_as_the_door_names_it(
    path: str, body: dict[str, Any], param: str
) -> None:
    async with running_mesh(engine__name="echo") as mesh:
        url = f"http://{mesh.http_address}/v1/"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as http:
            response = await http.post(path, json=body)

    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert "prompt." not in error["message"]
