"""A replay against a running mesh, in this process; and the command, as a process."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvmesh.core.errors import FixRequestError, MeshError, NotKnownError, Reason, TryElsewhereError
from kvmesh.replay.driver import generate_request, replay
from kvmesh.replay.outcome import Outcome
from kvmesh.replay.trace import TraceRow
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.mesh import read_baseline, running_mesh, wait_for_baseline
from kvmesh.testing.remote_prefills import NOWHERE
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2, router_pb2
from kvmesh.wire.routing import query_from_proto

SIMULATED: dict[str, Any] = {"engine__name": "simulated", "engine__speedup": 0, "mesh__prefill": 0}
BLOCK, ENGINE_BLOCK = 512, 64
"""Tokens of a trace's block, and of the simulated engine's."""


def row(at_ms: float, *hash_ids: int, output_length: int = 5, last_tokens: int = BLOCK) -> TraceRow:
    return TraceRow(at_ms, (len(hash_ids) - 1) * BLOCK + last_tokens, output_length, hash_ids)


async def test_every_request_of_a_trace_ends_once_and_the_mesh_gives_all_back() -> None:
    rows = [row(at // 4 * 10, 0, at % 7, 100 + at, output_length=1 + at % 9, last_tokens=1 + at) for at in range(60)]
    async with running_mesh(mesh__decode=2, **SIMULATED) as mesh:
        baseline = await read_baseline(mesh)
        ended: list[Outcome] = []

        result = await replay(rows, target=mesh.grpc_address, on_end=ended.append)

        assert (result.requests, result.lost, result.duplicated, result.short, result.errors) == (60, 0, 0, 0, 0)
        assert [len(ended), sum(one.tokens for one in ended)] == [60, sum(one.output_length for one in rows)]
        assert sum(one.prompt_tokens for one in ended) == sum(one.input_length for one in rows)
        await wait_for_baseline(mesh, baseline)


async def test_a_prefix_that_the_trace_shares_is_found_in_the_cache_and_was_predicted() -> None:
    first, second = row(0, 1, 2, 3), row(0, 1, 2, 4)
    async with running_mesh(mesh__decode=1, **SIMULATED) as mesh:
        cold = await replay([first], target=mesh.grpc_address)
        await _wait_indexed(mesh, first)

        warm = await replay([second], target=mesh.grpc_address)

    assert cold.hit_rate == cold.predicted_hit_rate == 0
    assert warm.hit_rate == warm.predicted_hit_rate == 2 / 3


async def _wait_indexed(mesh: Mesh, cached: TraceRow) -> None:
    """Wait until the router has heard that a worker holds the whole prompt, but for the block that is never reused."""
    wanted = router_pb2.RoutingQuery(
        model="simulated", token_ids=generate_request(cached, model="simulated").prompt.token_ids
    )
    query = query_from_proto(wanted, block_sizes=frozenset({ENGINE_BLOCK}))
    async with asyncio.timeout(20):
        while max(mesh.gateway.router.overlaps(query).values(), default=0) < cached.input_length // ENGINE_BLOCK - 1:
            await mesh.gateway.router.changed()


async def test_requests_go_out_at_the_traces_times_divided_by_the_speed() -> None:
    rows = [row(5_000, 1), row(5_000, 2), row(6_000, 3)]  # times count from the first row's
    ended: list[Outcome] = []
    async with running_mesh(mesh__decode=1, **SIMULATED) as mesh:
        result = await replay(rows, target=mesh.grpc_address, speed=5, on_end=ended.append)

    first, second, third = sorted(one.scheduled_at for one in ended)
    assert second == first
    assert third - first == pytest.approx(0.2)
    assert all(0 <= one.sent_at - one.scheduled_at < 10 for one in ended)
    assert 0.2 <= result.duration_s < 10


async def test_later_requests_do_not_wait_for_earlier_ones() -> None:
    frontend = Frontend()  # type: ignore[abstract]  # it serves what a replay calls
    frontend.holds_until = 8
    async with serving(frontend) as address:
        result = await replay([row(at, at, output_length=1) for at in range(8)], target=address, timeout_s=10)

    assert (result.requests, result.lost, result.errors) == (8, 0, 0)


class Frontend(frontend_pb2_grpc.FrontendServicer):
    """A door that does as the number of tokens asked for says."""

    def __init__(self, models: Sequence[str] = ("m",)) -> None:
        self.holds_until = 0
        """Answer nobody before this many wait."""
        self.asked: list[frontend_pb2.GenerateRequest] = []
        self._models = models
        self._changed = asyncio.Condition()

    async def wait_asked(self, count: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.asked) >= count)

    async def ListModels(self, request: Any, context: Any) -> frontend_pb2.ListModelsResponse:
        return frontend_pb2.ListModelsResponse(models=[frontend_pb2.Model(name=name) for name in self._models])

    async def Generate(
        self, request: frontend_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[frontend_pb2.GenerateResponse]:
        self.asked.append(request)
        async with self._changed:
            self._changed.notify_all()
        await self.wait_asked(self.holds_until)
        yield frontend_pb2.GenerateResponse(started=frontend_pb2.Started())
        if request.sampling.max_tokens == TYPED_ERROR:
            raise TryElsewhereError(Reason.WORKER_LOST, "")
        if request.sampling.max_tokens == UNTYPED_ERROR:
            await context.abort(grpc.StatusCode.DATA_LOSS)
        if request.sampling.max_tokens == CANCELLED:
            await context.abort(grpc.StatusCode.CANCELLED)
        if request.sampling.max_tokens == SILENCE:
            await asyncio.Event().wait()
        yield frontend_pb2.GenerateResponse(chunk=generation_pb2.Chunk(token_ids=[65] * request.sampling.max_tokens))
        if request.sampling.max_tokens == NO_END:
            return
        for _ in range(2 if request.sampling.max_tokens == TWO_ENDS else 1):
            yield frontend_pb2.GenerateResponse(finished=generation_pb2.Finished())


TYPED_ERROR, UNTYPED_ERROR, CANCELLED, SILENCE, NO_END, TWO_ENDS = range(11, 17)


@asynccontextmanager
async def serving(frontend: Frontend) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    frontend_pb2_grpc.add_FrontendServicer_to_server(frontend, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


async def test_each_way_to_end_is_counted_as_what_it_is() -> None:
    endings = (1, TYPED_ERROR, UNTYPED_ERROR, CANCELLED, SILENCE, NO_END, TWO_ENDS)
    rows = [row(0, 1, output_length=ending) for ending in endings]
    async with serving(Frontend()) as address:  # type: ignore[abstract]  # it serves what a replay calls
        result = await replay(rows, target=address, timeout_s=1)

    assert (result.requests, result.lost, result.duplicated, result.errors) == (7, 4, 1, 1)
    assert result.error_reasons == {"WORKER_LOST": 1}
    assert result.lost_reasons == {"DATA_LOSS": 1, "CANCELLED": 1, "DEADLINE_EXCEEDED": 1, "NOT_FINISHED": 1}


async def test_a_mesh_that_goes_away_is_an_error_of_every_request_that_ran() -> None:
    frontend = Frontend()  # type: ignore[abstract]  # it serves what a replay calls
    frontend.holds_until = 5  # of four: nobody is answered
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    frontend_pb2_grpc.add_FrontendServicer_to_server(frontend, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async with asyncio.TaskGroup() as group:
        running = group.create_task(replay([row(0, at) for at in range(4)], target=f"127.0.0.1:{port}", timeout_s=20))
        async with asyncio.timeout(5):
            await frontend.wait_asked(4)
        await server.stop(grace=None)

    result = running.result()
    assert (result.requests, result.lost, result.errors) == (4, 0, 4)


async def test_what_is_sent_is_what_the_row_asks() -> None:
    frontend, asked = Frontend(models=("a", "b")), row(0, 5, 6, output_length=2, last_tokens=100)  # type: ignore[abstract]  # it serves what a replay calls
    async with serving(frontend) as address:
        await replay([asked], target=address, model="b")

    (request,) = frontend.asked
    assert request == generate_request(asked, model="b")
    assert len(request.prompt.token_ids.token_ids) == 612
    assert (request.model, request.sampling.max_tokens, request.sampling.ignore_eos) == ("b", 2, True)


@pytest.mark.parametrize(
    ("models", "wanted", "error", "told"),
    [
        ((), "", TryElsewhereError(Reason.NO_WORKERS, ""), "no worker"),
        (("a",), "b", NotKnownError(Reason.UNKNOWN_MODEL, ""), "'b' is not served; models: a"),
        (("a", "b"), "", FixRequestError(Reason.INVALID_FIELD, ""), "name one of the models that are served: a, b"),
    ],
    ids=["none", "another", "several"],
)
async def test_without_the_model_nothing_is_sent(
    models: tuple[str, ...], wanted: str, error: MeshError, told: str
) -> None:
    frontend = Frontend(models)  # type: ignore[abstract]  # it serves what a replay calls
    async with serving(frontend) as address:
        with pytest.raises(type(error), match=told) as refusal:
            await replay([row(0, 1)], target=address, model=wanted)

    assert refusal.value.reason is error.reason
    assert frontend.asked == []


def write_trace(folder: Path, rows: Sequence[TraceRow]) -> Path:
    path = folder / "trace.jsonl"
    with path.open("w") as file:
        for one in rows:
            line = {
                "timestamp": one.timestamp_ms, "input_length": one.input_length,
                "output_length": one.output_length, "hash_ids": one.hash_ids,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
    return path


async def run_command(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvmesh.cli.main", "replay", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_command_prints_its_figures_as_json(tmp_path: Path) -> None:
    trace = write_trace(tmp_path, [row(at * 10, 0, at) for at in range(12)])
    paced = {**SIMULATED, "engine__speedup": 20}  # so that tokens arrive one by one, and there are gaps to measure
    async with running_mesh(mesh__decode=2, **paced) as mesh:
        code, out, err = await run_command(
            str(trace), "--limit", "10", "--speed", "2", "--json", "--model", "simulated", "--target", mesh.grpc_address
        )

    result = json.loads(out)
    assert (code, err) == (0, "")
    assert {name: result[name] for name in ("requests", "lost", "duplicated", "errors")} == {
        "requests": 10, "lost": 0, "duplicated": 0, "errors": 0,
    }  # fmt: skip
    assert 0 <= result["hit_rate"] < 1
    assert 0 <= result["predicted_hit_rate"] < 1
    for name in ("schedule_lag_ms", "ttft_ms", "itl_ms", "e2e_ms"):
        figures = result[name]
        assert set(figures) == {"mean", "p50", "p90", "p99"}
        assert 0 <= figures["p50"] <= figures["p90"] <= figures["p99"]


async def test_the_command_shows_a_table_and_fails_where_a_request_was_lost(tmp_path: Path) -> None:
    trace = write_trace(tmp_path, [row(0, 1, output_length=ending) for ending in (1, NO_END, TYPED_ERROR)])
    async with serving(Frontend()) as address:  # type: ignore[abstract]  # it serves what a replay calls
        code, out, err = await run_command(str(trace), "--target", address)

    lines = [line.split() for line in out.splitlines()]
    assert code == 1
    assert ["requests", "3"] in lines
    assert ["error", "WORKER_LOST", "1"] in lines
    assert ["lost", "NOT_FINISHED", "1"] in lines
    assert err == "error: of 3 requests, 1 lost and 0 doubled\n"


async def test_the_command_says_why_it_cannot_begin(tmp_path: Path) -> None:
    trace = write_trace(tmp_path, [row(0, 1)])
    broken = tmp_path / "broken.jsonl"
    broken.write_text(trace.read_text() + '{"timestamp": 1, "input_length": -1}\n')

    unreachable = await run_command(str(trace), "--target", NOWHERE)
    bad_file = await run_command(str(broken), "--target", NOWHERE)
    no_file = await run_command(str(tmp_path / "none.jsonl"), "--target", NOWHERE)
    async with serving(Frontend(("a",))) as address:  # type: ignore[abstract]  # it serves what a replay calls
        no_model = await run_command(str(trace), "--target", address, "--model", "b")

    assert unreachable[:2] == (1, "")
    assert f"error: cannot reach {NOWHERE}" in unreachable[2]
    assert bad_file == (2, "", f"error: {broken}, line 2: input_length: must be a whole number of tokens, 1 or more\n")
    assert no_file[:2] == (2, "")
    assert "none.jsonl" in no_file[2]
    assert no_model == (1, "", "error: UNKNOWN_MODEL: 'b' is not served; models: a\n")
