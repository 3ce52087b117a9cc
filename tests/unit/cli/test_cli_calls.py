"""The commands that call a mesh, run as processes against a real gRPC server."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc

from kvmesh.core.errors import BackOffError, FixRequestError, NotKnownError, Reason
from kvmesh.runtime.health import Health
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.testing.mesh_process import PROGRAM
from kvmesh.v1 import (
    frontend_pb2,
    frontend_pb2_grpc,
    generation_pb2,
    router_pb2,
    worker_control_pb2,
    worker_control_pb2_grpc,
)
from kvmesh.wire.validation import duration

EPOCH = 2**63 + 5
TOPOLOGY = frontend_pb2.Topology(
    policy="kv_aware",
    workers=[
        frontend_pb2.TopologyWorker(
            id="NODE1/decode/0",
            node="NODE1",
            role="decode",
            epoch=EPOCH,
            state=frontend_pb2.WORKER_STATE_READY,
            active_requests=2,
            active_blocks=128,
            total_blocks=512,
            prefix_hit_rate=0.25,
        ),
        frontend_pb2.TopologyWorker(
            id="NODE2/prefill/0", node="NODE2", role="prefill", epoch=7, state=frontend_pb2.WORKER_STATE_DRAINING
        ),
    ],
    queue=frontend_pb2.QueueStats(depth=3, leased=2, dead=1),
    counters=frontend_pb2.TopologyCounters(
        requests=10,
        remote_prefills=4,
        local_prefills=6,
        kv_bytes_moved=2**40,
        cached_tokens=100,
        predicted_cached_tokens=90,
        prompt_tokens=400,
    ),
)

COLOURED = "\x1b[31mr\xe9d\x1b[0m\r\n\x00\n"


@dataclass
class MeshServer:
    """A door with canned answers; what it was asked is kept."""

    address: str = ""
    health: Health = field(default_factory=Health)
    generated: list[frontend_pb2.GenerateRequest] = field(default_factory=list)
    drained: list[worker_control_pb2.DrainRequest] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)


class Frontend(frontend_pb2_grpc.FrontendServicer):
    def __init__(self, mesh: MeshServer) -> None:
        self._mesh = mesh

    async def GetTopology(self, request: Any, context: Any) -> frontend_pb2.GetTopologyResponse:
        return frontend_pb2.GetTopologyResponse(topology=TOPOLOGY)

    async def Generate(
        self, request: frontend_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[frontend_pb2.GenerateResponse]:
        self._mesh.generated.append(request)
        prompt = request.prompt.text
        if prompt == "":
            raise FixRequestError(Reason.EMPTY_PROMPT, "", field="prompt.text")
        if prompt == "hot":
            raise FixRequestError(
                Reason.INVALID_FIELD, "sampling.temperature: 9 is out of range", field="sampling.temperature"
            )
        if prompt == "overload":
            raise BackOffError(Reason.OVERLOADED, "", retry_after_s=1.5)
        started = _started(request)
        if prompt == "unrouted":
            note = "no router answered: round robin, unbooked"
            started.explanation.CopyFrom(router_pb2.Explanation(worker_id=started.worker_id, note=note))
            started.prefill.reason = "fallback_prefill_failed"
        yield frontend_pb2.GenerateResponse(started=started)
        yield frontend_pb2.GenerateResponse(chunk=generation_pb2.Chunk(text="Why "))
        if prompt == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                self._mesh.cancelled.set()
        ending = COLOURED if prompt == "colour" else "did [it]?"
        yield frontend_pb2.GenerateResponse(chunk=generation_pb2.Chunk(text=ending))
        if prompt != "broken":
            usage = generation_pb2.Usage(prompt_tokens=64, completion_tokens=3, cached_tokens=48)
            finished = generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_LENGTH, usage=usage)
            yield frontend_pb2.GenerateResponse(finished=finished)


class WorkerControl(worker_control_pb2_grpc.WorkerControlServicer):
    def __init__(self, mesh: MeshServer) -> None:
        self._mesh = mesh

    async def Drain(self, request: worker_control_pb2.DrainRequest, context: Any) -> worker_control_pb2.DrainResponse:
        self._mesh.drained.append(request)
        if request.worker_id != "NODE1/decode/0":
            raise NotKnownError(Reason.NOT_FOUND, f"no live worker is called {request.worker_id!r}", field="worker_id")
        return worker_control_pb2.DrainResponse(finished=3, cancelled=1)

    async def Undrain(
        self, request: worker_control_pb2.UndrainRequest, context: Any
    ) -> worker_control_pb2.UndrainResponse:
        was_draining = bool(self._mesh.drained)
        self._mesh.drained.clear()
        return worker_control_pb2.UndrainResponse(was_draining=was_draining)

    async def GetInfo(
        self, request: worker_control_pb2.GetInfoRequest, context: Any
    ) -> worker_control_pb2.GetInfoResponse:
        return worker_control_pb2.GetInfoResponse(worker_id=request.worker_id, draining=bool(self._mesh.drained))


def _started(request: frontend_pb2.GenerateRequest) -> frontend_pb2.Started:
    started = frontend_pb2.Started(worker_id="NODE1/decode/0", predicted_cached_tokens=32)
    if request.explain:
        started.explanation.CopyFrom(
            router_pb2.Explanation(
                policy="kv_aware",
                worker_id="NODE1/decode/0",
                prompt_tokens=64,
                candidates=[
                    router_pb2.CandidateExplanation(
                        worker_id="NODE1/decode/0",
                        cost=1.5,
                        terms={"prefill_blocks": 1, "decode_blocks": 0.5},
                        load_age=duration(0.25),
                        kv_age=duration(1.5),
                    ),
                    router_pb2.CandidateExplanation(
                        worker_id="NODE2/decode/0",
                        cost=4,
                        terms={"prefill_blocks": 4, "decode_blocks": 0},
                        lost="cost 4 > 1.5",
                        index_degraded=True,
                    ),
                ],
                knobs={"temperature": 0, "overlap_credit": 1.5},
                seed=7,
                note="least cost",
                rejected=[router_pb2.RejectedWorker(worker_id="NODE3/decode/0", reason="draining")],
            )
        )
    return started


@pytest.fixture
async def mesh() -> AsyncIterator[MeshServer]:
    mesh = MeshServer()
    mesh.health.set_serving("", True)
    mesh.health.set_serving("kvmesh.v1.Frontend", True)
    mesh.health.set_serving("kvmesh.v1.Router", False)
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    frontend_pb2_grpc.add_FrontendServicer_to_server(Frontend(mesh), server)  # type: ignore[abstract]  # only what commands call
    worker_control_pb2_grpc.add_WorkerControlServicer_to_server(WorkerControl(mesh), server)
    health_pb2_grpc.add_HealthServicer_to_server(mesh.health, server)
    mesh.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield mesh
    await server.stop(None)


async def start_cli(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(PROGRAM, *arguments, stdout=pipe, stderr=pipe)


async def run_cli(*arguments: str) -> tuple[int | None, str, str]:
    process = await start_cli(*arguments)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


def closed_address() -> str:
    """Return an address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


async def test_status_json_has_numbers_for_numbers_and_states_in_lower_case(mesh: MeshServer) -> None:
    code, out, _ = await run_cli("status", "--json", "--target", mesh.address)

    shown = json.loads(out)
    assert code == 0
    assert (
        shown["workers"][0].items()
        >= {
            "id": "NODE1/decode/0",
            "node": "NODE1",
            "role": "decode",
            "epoch": EPOCH,
            "state": "ready",
            "active_requests": 2,
            "active_blocks": 128,
            "total_blocks": 512,
        }.items()
    )
    assert shown["workers"][1].items() >= {"state": "draining", "active_requests": 0, "total_blocks": 0}.items()
    assert shown["queue"].items() >= {"depth": 3, "leased": 2, "dead": 1}.items()
    assert (
        shown["counters"].items()
        >= {
            "requests": 10,
            "remote_prefills": 4,
            "local_prefills": 6,
            "kv_bytes_moved": 2**40,
            "cached_tokens": 100,
            "predicted_cached_tokens": 90,
        }.items()
    )


async def test_status_shows_workers_queue_and_cache_hits(mesh: MeshServer) -> None:
    code, out, _ = await run_cli("status", "--target", mesh.address)

    assert code == 0
    assert "NODE2/prefill/0" in out
    assert "128/512" in out
    assert "3 waiting, 2 leased, 1 dead" in out
    assert "25.0% of prompt tokens hit, 22.5% predicted by kv_aware" in out


async def test_without_a_mesh_the_error_says_how_to_start_one() -> None:
    address = closed_address()

    code, out, err = await run_cli("status", "--target", address)

    assert (code, out) == (1, "")
    assert err.startswith(f"error: cannot reach {address} (")
    assert "`kvmesh up`" in err
    assert len(err.splitlines()) == 1


async def test_a_port_that_answers_in_http_is_taken_for_the_http_port() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await reader.read()  # to close with bytes unread would reset the connection
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        result = await run_cli("status", "--target", address)

    said = "does not speak gRPC: is it the HTTP port? --target wants that of gRPC"
    assert result == (1, "", f"error: {address} {said}\n")


async def test_generate_prints_the_output_and_a_footer_beside_it(mesh: MeshServer) -> None:
    arguments = ("--model", "tiny", "--max-tokens", "3", "--temperature", "0", "--target", mesh.address)
    code, out, err = await run_cli("generate", "Tell me a joke", *arguments)

    assert (code, out) == (0, "Why did [it]?\n")
    assert err.startswith("[NODE1/decode/0: 3 tokens, length; prompt 64 tokens, 48 cached, 32 predicted; ")
    request = mesh.generated[0]
    assert (request.prompt.text, request.model, request.explain) == ("Tell me a joke", "tiny", False)
    assert request.sampling.max_tokens == 3
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0


async def test_generate_leaves_sampling_to_the_mesh_unless_told(mesh: MeshServer) -> None:
    await run_cli("generate", "hello", "--target", mesh.address)

    sampling = mesh.generated[0].sampling
    assert not sampling.HasField("max_tokens")
    assert not sampling.HasField("temperature")


async def test_generate_prints_each_chunk_as_it_arrives_and_ctrl_c_cancels_the_request(mesh: MeshServer) -> None:
    process = await start_cli("generate", "hang", "--target", mesh.address)
    assert process.stdout is not None

    first = await asyncio.wait_for(process.stdout.readexactly(4), 30)
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.communicate(), 30)

    assert first == b"Why "
    assert process.returncode == 130
    await asyncio.wait_for(mesh.cancelled.wait(), 10)


async def test_generate_gives_up_at_the_deadline(mesh: MeshServer) -> None:
    code, _, err = await run_cli("generate", "hang", "--timeout", "0.5", "--target", mesh.address)

    assert code == 1
    assert "error: " in err
    assert "--timeout" in err
    await asyncio.wait_for(mesh.cancelled.wait(), 10)


async def test_generate_without_streaming_prints_the_same(mesh: MeshServer) -> None:
    code, out, _ = await run_cli("generate", "hello", "--no-stream", "--target", mesh.address)

    assert (code, out) == (0, "Why did [it]?\n")


async def test_generate_explains_every_candidate_with_every_term(mesh: MeshServer) -> None:
    code, out, err = await run_cli("generate", "hello", "--explain", "--target", mesh.address)

    lines = [line.split() for line in err.splitlines()]
    assert (code, out) == (0, "Why did [it]?\n")
    assert lines[0] == [
        "worker", "cost", "prefill_blocks", "decode_blocks", "load", "age", "kv", "age", "lost", "because",
    ]  # fmt: skip
    assert lines[1] == ["NODE1/decode/0", "1.5", "1", "0.5", "0.250", "s", "1.500", "s", "chosen"]
    assert lines[2] == ["NODE2/decode/0", "4", "4", "0", "-", "degraded", "cost", "4", ">", "1.5"]
    assert lines[4] == ["NODE3/decode/0", "-", "-", "draining"]
    assert "policy kv_aware (overlap_credit 1.5, temperature 0): least cost\n64 prompt tokens, seed 7\n" in err


@pytest.mark.parametrize("flags", [(), ("--no-stream",)])
async def test_what_generate_writes_to_a_pipe_is_the_output_byte_for_byte_and_a_newline(
    mesh: MeshServer, flags: tuple[str, ...]
) -> None:
    process = await start_cli("generate", "colour", *flags, "--target", mesh.address)

    out, _ = await asyncio.wait_for(process.communicate(), 30)

    assert out == b"Why \x1b[31mr\xc3\xa9d\x1b[0m\r\n\x00\n"


async def test_a_choice_that_no_router_made_is_explained_in_one_line_and_a_failed_remote_prefill_in_the_footer(
    mesh: MeshServer,
) -> None:
    code, _, err = await run_cli("generate", "unrouted", "--explain", "--target", mesh.address)

    explanation, footer = err.splitlines()
    assert code == 0
    assert explanation == "no router answered: round robin, unbooked"
    assert footer.endswith("prefill local, as the remote one failed: PREFILL_FAILED]")


async def test_a_prompt_that_is_no_text_is_refused_in_one_line(mesh: MeshServer) -> None:
    result = await run_cli("generate", os.fsdecode(b"a\xff"), "--target", mesh.address)

    assert result == (2, "", "error: PROMPT is not UTF-8\n")
    assert mesh.generated == []


async def test_generate_fails_when_the_stream_ends_without_a_result(mesh: MeshServer) -> None:
    code, out, err = await run_cli("generate", "broken", "--target", mesh.address)

    assert (code, out) == (1, "Why did [it]?\n")
    assert "incomplete" in err


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", "EMPTY_PROMPT: The prompt is empty: send at least one token of text. (field prompt.text)"),
        ("hot", "INVALID_FIELD: sampling.temperature: 9 is out of range"),
        (
            "overload",
            "OVERLOADED: Every eligible worker is at its limit: back off and retry. (try again in 1.5 s)",
        ),
    ],
)
async def test_an_error_of_the_mesh_shows_reason_text_and_field(mesh: MeshServer, prompt: str, error: str) -> None:
    result = await run_cli("generate", prompt, "--target", mesh.address)

    assert result == (1, "", f"error: {error}\n")


async def test_drain_names_what_became_of_the_requests(mesh: MeshServer) -> None:
    code, out, _ = await run_cli("drain", "NODE1/decode/0", "--timeout", "2.5", "--target", mesh.address)

    assert (code, out) == (0, "NODE1/decode/0 is drained: 3 finished, 1 cancelled\n")
    assert (mesh.drained[0].timeout.seconds, mesh.drained[0].timeout.nanos) == (2, 500_000_000)


async def test_drain_of_a_drained_worker_says_that_it_was(mesh: MeshServer) -> None:
    for _ in range(2):
        code, out, _ = await run_cli("drain", "NODE1/decode/0", "--target", mesh.address)

    assert (code, out) == (0, "NODE1/decode/0 was drained already\n")


async def test_undrain_says_whether_there_was_anything_to_undo(mesh: MeshServer) -> None:
    await run_cli("drain", "NODE1/decode/0", "--target", mesh.address)

    shown = [await run_cli("undrain", "NODE1/decode/0", "--target", mesh.address) for _ in range(2)]

    assert shown == [
        (0, "NODE1/decode/0 takes new work\n", ""),
        (0, "NODE1/decode/0 takes new work: it did not drain\n", ""),
    ]


async def test_drain_of_an_unknown_worker_fails(mesh: MeshServer) -> None:
    code, _, err = await run_cli("drain", "NODE9/decode/0", "--target", mesh.address)

    assert code == 1
    assert err.startswith("error: NOT_FOUND: ")
    assert "NODE9/decode/0" in err


@pytest.mark.parametrize("service", ["", "kvmesh.v1.Frontend"])
async def test_probe_exits_0_when_serving(mesh: MeshServer, service: str) -> None:
    code, out, _ = await run_cli("probe", mesh.address, "--service", service)

    assert (code, out) == (0, "SERVING\n")


async def test_probe_exits_2_when_it_cannot_connect() -> None:
    code, _, err = await run_cli("probe", closed_address())

    assert code == 2
    assert err.startswith("error: cannot connect to ")


async def test_probe_exits_2_when_nothing_speaks_grpc_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code, _, _ = await run_cli("probe", f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.5")

    assert code == 2


async def test_probe_exits_3_when_the_call_fails(mesh: MeshServer) -> None:
    code, _, err = await run_cli("probe", mesh.address, "--service", "nobody")

    assert code == 3
    assert err.startswith("error: NOT_FOUND: ")


async def test_probe_exits_4_when_not_serving(mesh: MeshServer) -> None:
    code, _, err = await run_cli("probe", mesh.address, "--service", "kvmesh.v1.Router")

    assert (code, err) == (4, "error: kvmesh.v1.Router is NOT_SERVING\n")
