"""A mesh in front of another mesh's OpenAI door, and in front of servers that misbehave."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.core.errors import TryElsewhereError
from kvmesh.runtime.mesh import Mesh
from kvmesh.runtime.worker import Worker
from kvmesh.testing.mesh import Answer, generate, open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.testing.mesh_process import MeshProcess, run_kvmesh
from kvmesh.testing.openai_upstream_server import OpenAiUpstreamServer, Script
from kvmesh.testing.tiny_tokenizer import write_tiny_tokenizer
from kvmesh.testing.vllm_publisher import VllmPublisher, stored
from kvmesh.v1 import decode_worker_pb2, frontend_pb2, generation_pb2, router_pb2
from kvmesh.wire.routing import query_from_proto

if TYPE_CHECKING:
    from kvmesh.v1.frontend_pb2_grpc import FrontendAsyncStub

ENGINE: dict[str, Any] = {"engine__name": "openai_upstream", "mesh__prefill": 0, "mesh__decode": 1}
BOUND_S = 20.0


@pytest.fixture(scope="module")
def upstream() -> Iterator[MeshProcess]:
    with MeshProcess("--engine", "echo", "--node-names", "BEHIND") as mesh:
        yield mesh


@pytest.fixture
def server() -> Iterator[OpenAiUpstreamServer]:
    with OpenAiUpstreamServer() as server:
        yield server


async def answers_of(frontend: "FrontendAsyncStub", count: int) -> list[Answer | BaseException]:
    """Run so many requests, five at a time."""
    answers: list[Answer | BaseException] = []
    for _ in range(0, count, 5):
        sampling = generation_pb2.SamplingParams(max_tokens=1)
        some = (generate(frontend, "hello", sampling=sampling) for _ in range(5))
        answers += await asyncio.gather(*some, return_exceptions=True)
    return answers


def states_of(mesh: Mesh) -> list[int]:
    workers = sorted(mesh.topology().workers, key=lambda worker: worker.id)
    return [worker.state for worker in workers]


async def in_state(mesh: Mesh, index: int, state: int) -> None:
    async with asyncio.timeout(BOUND_S):
        while states_of(mesh)[index] != state:
            await mesh.gateway.router.changed()


async def decode_health(worker: Worker) -> int:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        name = decode_worker_pb2.DESCRIPTOR.services_by_name["DecodeWorker"].full_name
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=BOUND_S)
        return int(answer.status)


async def test_a_mesh_answers_with_what_the_mesh_behind_it_says(upstream: MeshProcess) -> None:
    async with (
        running_mesh(**ENGINE, engine__options__url=f"{upstream.http_url}/v1") as mesh,
        open_frontend(mesh) as frontend,
    ):
        answer = await generate(frontend, "Tell me a joke")

        assert answer.text == "Tell me a joke_GeneratedBy_BEHIND"
        assert answer.finished is not None
        assert answer.finished.reason == generation_pb2.FINISH_REASON_STOP
        assert answer.finished.usage.prompt_tokens == len("Tell me a joke")


async def test_chats_and_models_go_through_both_meshes(upstream: MeshProcess) -> None:
    async with (
        running_mesh(**ENGINE, engine__options__url=f"{upstream.http_url}/v1", engine__options__api="chat") as mesh,
        httpx.AsyncClient(base_url=f"http://{mesh.http_address}", timeout=BOUND_S, trust_env=False) as client,
    ):
        models = (await client.get("/v1/models")).json()
        chat = await client.post(
            "/v1/chat/completions",
            json={"model": "echo", "messages": [{"role": "user", "content": "Which team won?"}], "stop": ["won"]},
        )

        assert [model["id"] for model in models["data"]] == ["echo"]
        choice = chat.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Which team ", "stop")


async def test_many_requests_at_once_leave_nothing_behind(upstream: MeshProcess) -> None:
    async with (
        running_mesh(**ENGINE, engine__options__url=f"{upstream.http_url}/v1") as mesh,
        open_frontend(mesh) as frontend,
    ):
        baseline = await read_baseline(mesh)

        answers = await asyncio.gather(*(generate(frontend, f"request number {number}") for number in range(40)))

        assert [answer.text for answer in answers] == [
            f"request number {number}_GeneratedBy_BEHIND" for number in range(40)
        ]
        await wait_for_baseline(mesh, baseline)


async def test_each_worker_has_the_upstream_of_its_number(upstream: MeshProcess, server: OpenAiUpstreamServer) -> None:
    server.models = [{"id": "echo"}]
    server.script = Script(words=["from the other"])
    urls = f"{upstream.http_url}/v1,{server.url}"
    overrides = {**ENGINE, "mesh__decode": 2, "engine__options__url": urls, "router__policy": "round_robin"}
    async with running_mesh(**overrides) as mesh, open_frontend(mesh) as frontend:
        answers = [await generate(frontend, "hello") for _ in range(4)]

        assert sorted(answer.text for answer in answers) == ["from the other"] * 2 + ["hello_GeneratedBy_BEHIND"] * 2


async def test_the_upstreams_kv_events_reach_the_router(server: OpenAiUpstreamServer, tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "model")
    publisher = await VllmPublisher.start()
    prompt = [30 + number % 200 for number in range(33)]
    overrides = {
        **ENGINE, "engine__model": folder, "engine__options__url": server.url, "engine__options__prompts": "tokens",
        "engine__options__kv_events": publisher.endpoint,
        "engine__options__kv_events_replay": publisher.replay_endpoint,
    }  # fmt: skip
    try:
        async with running_mesh(**overrides) as mesh, open_frontend(mesh) as frontend:
            await publisher.wait_subscribed()
            await publisher.publish(stored(11, 12, tokens=prompt[:32]))
            asked = router_pb2.RoutingQuery(model="upstream-model")
            asked.token_ids.token_ids.extend(prompt)
            query = query_from_proto(asked, block_sizes={16})
            router = mesh.gateway.router
            async with asyncio.timeout(BOUND_S):
                while 2 not in router.overlaps(query).values():
                    await router.changed()

            given = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=prompt))
            answer = await generate(frontend, given, sampling=generation_pb2.SamplingParams(max_tokens=2))

            assert answer.finished is not None
            assert (answer.finished.usage.prompt_tokens, answer.finished.usage.cached_tokens) == (33, 32)
            assert server.requests[0]["prompt"] == prompt
    finally:
        await publisher.aclose()


async def test_a_client_that_leaves_ends_the_upstreams_request(server: OpenAiUpstreamServer) -> None:
    server.script = Script(hold_after=1)
    async with running_mesh(**ENGINE, engine__options__url=server.url) as mesh, open_frontend(mesh) as frontend:
        baseline = await read_baseline(mesh)
        heard = Answer()
        running = asyncio.create_task(generate(frontend, "one two three", into=heard))
        await asyncio.to_thread(server.wait_requests, 1)

        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

        await asyncio.to_thread(server.wait_gone, 1)
        await wait_for_baseline(mesh, baseline)


async def test_the_clients_deadline_ends_the_upstreams_request(server: OpenAiUpstreamServer) -> None:
    server.script = Script(hold_after=0)
    async with running_mesh(**ENGINE, engine__options__url=server.url) as mesh, open_frontend(mesh) as frontend:
        baseline = await read_baseline(mesh)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(frontend, "one two three", timeout_s=0.5)

        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.to_thread(server.wait_gone, 1)
        await wait_for_baseline(mesh, baseline)


async def test_an_upstream_that_breaks_off_fails_that_request_and_no_other(server: OpenAiUpstreamServer) -> None:
    server.script = Script(cut_after=1)
    async with running_mesh(**ENGINE, engine__options__url=server.url) as mesh, open_frontend(mesh) as frontend:
        heard = Answer()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(frontend, "one two three", into=heard)
        server.script = Script()

        answer = await generate(frontend, "one two three", sampling=generation_pb2.SamplingParams(max_tokens=2))

        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert heard.finished is None
        assert answer.text == "one two "


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, grpc.StatusCode.INVALID_ARGUMENT),
        (404, grpc.StatusCode.NOT_FOUND),
        (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (500, grpc.StatusCode.UNAVAILABLE),
        (401, grpc.StatusCode.INTERNAL),
    ],
)
async def test_what_the_upstream_answers_is_what_the_client_should_do(
    status: int, code: grpc.StatusCode, server: OpenAiUpstreamServer
) -> None:
    server.script = Script(status=status)
    async with running_mesh(**ENGINE, engine__options__url=server.url) as mesh, open_frontend(mesh) as frontend:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(frontend, "one two three")

    assert caught.value.code() is code


async def test_a_request_that_one_upstream_fails_is_answered_by_another(server: OpenAiUpstreamServer) -> None:
    server.script = Script(status=503)
    with OpenAiUpstreamServer() as other:
        overrides = {**ENGINE, "mesh__decode": 2, "engine__options__url": f"{server.url},{other.url}"}
        async with running_mesh(**overrides) as mesh, open_frontend(mesh) as frontend:
            answers = [
                await generate(frontend, "hello", sampling=generation_pb2.SamplingParams(max_tokens=1))
                for _ in range(4)
            ]

    assert [answer.text for answer in answers] == ["hello"] * 4
    assert len(other.requests) == 4


@pytest.mark.parametrize("policy", ["least_loaded", "kv_aware"])
async def test_dead_upstreams_are_left_out_until_they_are_back(policy: str) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(OpenAiUpstreamServer()) for _ in range(3)]
        urls = ",".join(server.url for server in servers)
        overrides = {**ENGINE, "mesh__decode": 3, "engine__options__url": urls, "router__policy": policy}
        with structlog.testing.capture_logs() as lines:
            async with running_mesh(**overrides) as mesh, open_frontend(mesh) as frontend:
                for server in servers[1:]:
                    server.stop()
                first = await answers_of(frontend, 30)
                last = await answers_of(frontend, 30)
                states = states_of(mesh)
                healths = [await decode_health(worker) for worker in mesh.workers]
                again = stack.enter_context(OpenAiUpstreamServer(port=servers[1].port))
                await in_state(mesh, 1, frontend_pb2.WORKER_STATE_READY)
                after = await answers_of(frontend, 30)

    out = frontend_pb2.WORKER_STATE_DRAINING
    assert states == [frontend_pb2.WORKER_STATE_READY, out, out]
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert healths == [serving, not_serving, not_serving]
    assert sum(isinstance(answer, Exception) for answer in first) <= 5
    assert [answer for answer in (*last, *after) if isinstance(answer, Exception)] == []
    assert len(again.requests) > 0
    gone = [line for line in lines if line["event"] == "worker.out_of_service"]
    assert sorted(line["worker_id"] for line in gone) == ["NODE2/decode/1", "NODE3/decode/2"]
    assert [line["worker_id"] for line in lines if line["event"] == "worker.in_service"] == ["NODE2/decode/1"]
    failed = [line for line in lines if line["event"] == "request.failed"]
    assert {line["log_level"] for line in failed} == {"warning"}
    assert any(servers[1].url in line["detail"] for line in failed if line["worker_id"] == "NODE2/decode/1")
    assert len(failed) == len({(line["worker_id"], line["request_id"]) for line in failed})


async def test_the_usage_that_the_client_reads_is_the_upstreams(server: OpenAiUpstreamServer) -> None:
    counted = {"prompt_tokens": 5, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    server.script = Script(words=["some", " words"], usage=counted)
    async with running_mesh(**ENGINE, engine__options__url=server.url) as mesh, open_frontend(mesh) as frontend:
        answer = await generate(frontend, "one two three")

    assert answer.finished is not None
    usage = answer.finished.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (5, 9, 4)


async def test_a_mesh_whose_upstream_is_not_there_does_not_start(server: OpenAiUpstreamServer) -> None:
    server.stop()

    with pytest.raises(TryElsewhereError, match="nothing answers at"):
        async with running_mesh(**ENGINE, engine__options__url=server.url):
            pass


def test_up_says_in_one_line_what_to_start(server: OpenAiUpstreamServer) -> None:
    server.stop()

    ended = run_kvmesh(
        "up", "--engine", "openai_upstream", "--engine-option", f"url={server.url}", "--http-port", "0",
        "--grpc-port", "0",
    )  # fmt: skip

    assert ended.returncode != 0
    assert f"nothing answers at {server.url}: start the server or fix --engine-option url" in " ".join(
        ended.stderr.split()
    )
    assert "Traceback" not in ended.stderr
