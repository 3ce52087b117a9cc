"""Several choices and prompts, stop strings, and what is refused: the official client against a whole mesh."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import openai
import pytest
import pytest_asyncio

from kvmesh.core.errors import Reason
from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.held_engine import held_plan
from kvmesh.testing.mesh import Baseline, generate, open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.testing.openai_upstream_server import OpenAiUpstreamServer
from kvmesh.v1 import generation_pb2
from kvmesh.wire.error_catalog import from_rpc_error

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOUND_S = 20.0
SEED = 5
ASKED: dict[str, Any] = {"model": "simulated", "max_tokens": 12, "seed": SEED}
PROMPTS = ["What is a service mesh?", "Why would anybody want to have one of them?"]
JSON_OBJECT: Any = {"type": "json_object"}
TOOLS: Any = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
HELLO: Any = [{"role": "user", "content": "hello"}]


def client_of(mesh: Mesh, *, max_retries: int = 0, **hooks: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"http://{mesh.http_address}/v1",
        api_key="unused",
        max_retries=max_retries,
        timeout=BOUND_S,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False, event_hooks=hooks),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    async with running_mesh(
        engine__name="simulated", engine__speedup=0, engine__options__block_size="16", mesh__prefill=0
    ) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def client(mesh: Mesh) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(mesh) as client:
        yield client


def with_requests(baseline: Baseline, count: int) -> Baseline:
    """Return what the mesh holds while so many requests wait in the engine of its one worker."""
    ((worker_id, held),) = baseline.workers.items()
    return replace(
        baseline,
        workers={worker_id: replace(held, requests=count)},
        active_requests=count,
        reservations=count,
        running=count,
    )


async def text_of(client: openai.AsyncOpenAI, prompt: str, **changes: Any) -> str:
    text: str = (await client.completions.create(**{**ASKED, "prompt": prompt, **changes})).choices[0].text
    return text


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_are_those_of_n_seeds(client: openai.AsyncOpenAI, mesh: Mesh, stream: bool) -> None:
    baseline = await read_baseline(mesh)
    expected = [await text_of(client, PROMPTS[0], seed=SEED + index) for index in range(3)]
    asked = {**ASKED, "prompt": PROMPTS[0], "n": 3}

    if stream:
        chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        assert len({chunk.id for chunk in chunks}) == 1
    else:
        choices = (await client.completions.create(**asked)).choices

    texts = ["".join(choice.text for choice in choices if choice.index == index) for index in range(3)]
    ends = [(choice.index, choice.finish_reason) for choice in choices if choice.finish_reason]
    assert len(set(expected)) == 3
    assert texts == expected
    assert sorted(ends) == [(0, "length"), (1, "length"), (2, "length")]
    await wait_for_baseline(mesh, baseline)


async def test_a_chat_with_choices_says_who_speaks_in_each_and_counts_its_prompt_once(
    client: openai.AsyncOpenAI,
) -> None:
    asked: Any = {**ASKED, "messages": HELLO, "n": 2}
    whole = await client.chat.completions.create(**asked)
    stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]

    assert [choice.index for choice in whole.choices] == [0, 1]
    for index in range(2):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert own[0].delta.role == "assistant"
        assert own[-1].finish_reason == "length"
        assert "".join(choice.delta.content or "" for choice in own) == whole.choices[index].message.content
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []
    for usage in (whole.usage, chunks[-1].usage):
        assert (usage.prompt_tokens, usage.completion_tokens) == (len("user: hello\n"), 2 * 12)


async def test_several_prompts_are_answered_in_their_order(client: openai.AsyncOpenAI) -> None:
    expected = [await text_of(client, prompt, seed=SEED + index) for prompt in PROMPTS for index in range(2)]

    reply = await client.completions.create(**ASKED, prompt=PROMPTS, n=2)

    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == expected
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(map(len, PROMPTS))


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echoed_prompt_comes_before_its_answer(client: openai.AsyncOpenAI, stream: bool) -> None:
    expected = PROMPTS[0] + await text_of(client, PROMPTS[0])

    if stream:
        asked = await client.completions.create(**ASKED, prompt=PROMPTS[0], echo=True, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in asked])
    else:
        text = await text_of(client, PROMPTS[0], echo=True)

    assert text == expected


async def test_the_beginning_of_a_stop_string_that_does_not_go_on_is_not_lost(client: openai.AsyncOpenAI) -> None:
    text = await text_of(client, PROMPTS[0], max_tokens=40)
    stop = [text[5:9] + "\x00", text[20:30] + "\x00", text[-3:] + "\x00"]

    asked = {**ASKED, "prompt": PROMPTS[0], "max_tokens": 40}
    stream = await client.completions.create(**asked, stop=stop, stream=True)
    chunks = [chunk async for chunk in stream]

    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_a_stop_string_over_several_tokens_never_shows_in_a_stream(client: openai.AsyncOpenAI) -> None:
    text = await text_of(client, PROMPTS[0], max_tokens=40)
    stop = text[17:24]

    stream = await client.completions.create(
        **{**ASKED, "prompt": PROMPTS[0], "max_tokens": 40}, stop=["\x00", "\x01", stop, "\x02"], stream=True
    )
    pieces = [chunk.choices[0].text async for chunk in stream]

    assert "".join(pieces) == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"response_format": JSON_OBJECT}, "response_format"),
        ({"tools": TOOLS}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ],
    ids=["logprobs", "response-format", "tools", "tool-choice", "top-logprobs-alone", "five-stops"],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_cannot_do_is_a_bad_request_that_names_the_field(
    client: openai.AsyncOpenAI, changes: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="simulated", messages=HELLO, stream=stream, **changes)

    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert refused.value.request_id
    assert param in refused.value.message


async def test_grpc_clients_are_told_which_field_the_engine_cannot_serve(mesh: Mesh) -> None:
    sampling = generation_pb2.SamplingParams(logprobs=0)

    async with open_frontend(mesh) as frontend:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(frontend, "hello", sampling=sampling)

    error = from_rpc_error(refused.value)
    assert (error.reason, error.field) == (Reason.INVALID_FIELD, "sampling.logprobs")


async def test_a_response_format_reaches_an_upstream_as_it_was_sent() -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    with OpenAiUpstreamServer() as server:
        async with (
            running_mesh(
                engine__name="openai_upstream", engine__options__url=server.url, mesh__prefill=0, mesh__decode=1
            ) as mesh,
            client_of(mesh) as client,
        ):
            await client.chat.completions.create(model="upstream-model", messages=HELLO, response_format=wanted)
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model="upstream-model", messages=HELLO, logprobs=True)

    assert [body.get("response_format") for body in server.requests] == [wanted]
    assert refused.value.param == "logprobs"


async def test_overload_is_retried_exactly_as_often_as_the_client_was_told() -> None:
    sent: list[Any] = []

    async def note(request: Any) -> None:
        sent.append(request.headers.get("x-stainless-retry-count"))

    async with running_mesh(
        engine__name="simulated", engine__speedup=1.0, engine__options__max_sequences="1",
        mesh__decode=1, mesh__prefill=0, router__max_requests_per_slot=1.0,
    ) as mesh, client_of(mesh) as holding, client_of(mesh, max_retries=2, request=[note]) as client:  # fmt: skip
        held = await holding.completions.create(model="simulated", prompt="hold", max_tokens=100_000, stream=True)
        await anext(held)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(model="simulated", prompt="me too", max_tokens=1)
        await held.close()

    assert sent == ["0", "1", "2"]
    assert int(refused.value.response.headers["retry-after-ms"]) > 0
    assert refused.value.type == "rate_limit_error"


async def test_a_worker_that_dies_ends_every_choice_with_one_error() -> None:
    plan, engines = held_plan()
    words: list[list[str]] = [[], []]
    async with running_mesh(plan=plan, mesh__decode=1, mesh__prefill=0) as mesh, client_of(mesh) as client:
        baseline = await read_baseline(mesh)
        asked = client.completions.create(model="held", prompt="a b c d e f", n=2, stream=True)
        async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as tasks:
            begun = tasks.create_task(asked)
            await wait_for_baseline(mesh, with_requests(baseline, 2))
            engines["NODE1"].allow(3)
            stream = await begun
            while sum(map(len, words)) < 2 * 3:
                (choice,) = (await anext(stream)).choices
                words[choice.index].append(choice.text)
        engines["NODE1"].break_down()

        with pytest.raises(openai.APIError) as lost:
            [chunk async for chunk in stream]

    assert words == [["a ", "b ", "c "]] * 2
    assert lost.value.body == {
        "message": lost.value.message, "type": lost.value.type, "param": None, "code": "worker_lost",
    }  # fmt: skip


async def test_a_client_that_leaves_ends_every_choice() -> None:
    plan, _ = held_plan(steps=2)
    async with running_mesh(plan=plan, mesh__decode=1, mesh__prefill=0) as mesh, client_of(mesh) as client:
        baseline = await read_baseline(mesh)
        stream = await client.completions.create(model="held", prompt="a b c d e f", n=3, stream=True)
        await anext(stream)

        await stream.close()

        await wait_for_baseline(mesh, baseline)
