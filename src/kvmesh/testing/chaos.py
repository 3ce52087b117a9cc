"""Requests through a mesh that is being disturbed, each answer held against that of one undisturbed process.

What must hold, whatever happens meanwhile:
    no wrong token       an answer is the expected one; of one that fails, what came is its beginning
    no hang              every request ends before its deadline, which is far beyond every wait
    no leak              once all is well again, nobody holds a block, pin, import, slot, task, lease or booking
A request may fail only with a reason that says who was lost.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import Reason
from kvmesh.testing.chaos_disturbances import Disturbances
from kvmesh.testing.chaos_mesh import ENGINE_OPTIONS, ChaosMesh
from kvmesh.testing.mesh import generate, open_frontend, running_mesh
from kvmesh.testing.tiny_model import write_tiny_model
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2
from kvmesh.wire.error_catalog import from_rpc_error

_DEADLINE_S = 90.0
"""Of a request: the sum of the waits on its way is below half of it."""
_BEYOND_S = 5.0
_ALONE_S = 600.0
"""For an undisturbed answer, which is waited for however busy the machine is."""
_MAY_FAIL_WITH = frozenset({Reason.WORKER_LOST, Reason.NO_WORKERS})
"""The worker that streams is lost, or none is left."""
_HUNG, _DOOR_LOST = "hung", "failed_door_lost"
_ASKED_AT_MOST = 4
"""Times a client asks whose connection to the gateway breaks: nobody else can save it."""
_IN_FLIGHT = 24
"""Requests at once: what waits for more is not under way, and nobody's to lose."""
_QUIET_S = 60.0
"""Within this everything is given back: longer than a pin's time and a booking's."""
_LOOK_AGAIN_S = 0.2
_DETAILS = "grpc-status-details-bin"
"""What every error of the mesh's own carries."""
_VOCABULARY = (5, 512)
_PREFIXES = 8


log = telemetry.logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """What is asked, and how much it is disturbed."""

    requests: int = 1_000
    seed: int = 0
    rate: float = 8.0
    """Requests per second on average; they come in bursts."""
    mean_gap_s: float = 1.5
    """Between two disturbances."""
    mode: str = "queue"
    """Setting `remote_prefill.mode`."""
    log_level: str = "critical"


@dataclass(slots=True)
class ChaosResult:
    """What came of it."""

    requests: int = 0
    wrong: int = 0
    hung: int = 0
    asked_again: int = 0
    """Streams that broke with the connection to the gateway, and whose question was put again."""
    unexpected: int = 0
    """Failures with a reason that no disturbance explains."""
    leaked: int = 0
    """Blocks, pins, imports, slots, tasks, leases and bookings together."""
    leaks: dict[str, int] = field(default_factory=dict)
    """By holder and kind."""
    outcomes: Counter[str] = field(default_factory=Counter)
    disturbances: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    """What a person looks at first when something is not 0."""

    @property
    def is_good(self) -> bool:
        """Nothing was wrong, hung, unexpected or leaked."""
        return not (self.wrong or self.hung or self.unexpected or self.leaked)


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt, and how many tokens to answer with, greedily."""

    tokens: tuple[int, ...]
    max_tokens: int

    def request(self) -> frontend_pb2.GenerateRequest:
        """Return what is asked."""
        return frontend_pb2.GenerateRequest(
            prompt=generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=self.tokens)),
            sampling=generation_pb2.SamplingParams(max_tokens=self.max_tokens, temperature=0, ignore_eos=True),
        )


async def run_chaos(plan: ChaosPlan, *, folder: Path) -> ChaosResult:
    """Run the plan with files in `folder`. Raises: TimeoutError when the mesh does not come up, or back."""
    rng = random.Random(plan.seed)
    model = write_tiny_model(folder / "tiny")
    questions = _questions(max(plan.requests // 2, _PREFIXES), rng)
    expected = await _undisturbed(questions, model)
    asked = [rng.randrange(len(questions)) for _ in range(plan.requests)]
    result = ChaosResult()
    mesh = ChaosMesh(model=model, folder=folder, mode=plan.mode, log_level=plan.log_level)
    try:
        await mesh.start()
        disturbances = Disturbances(mesh, rng=random.Random(plan.seed + 1), mean_gap_s=plan.mean_gap_s)
        result.disturbances = disturbances.counts
        disturbances.start()
        try:
            await _ask_all(mesh, [(questions[number], expected[number]) for number in asked], plan.rate, rng, result)
        finally:
            await disturbances.aclose()
        await mesh.wait_ready()
        await _wait_quiet(mesh, result)
    finally:
        await mesh.stop()
    return result


async def _ask_all(
    mesh: ChaosMesh,
    asked: Sequence[tuple[Question, list[int]]],
    rate: float,
    rng: random.Random,
    result: ChaosResult,
) -> None:
    """Ask in bursts, `rate` per second on average, and wait for every end."""
    room = asyncio.Semaphore(_IN_FLIGHT)

    async def ask_in_turn(question: Question, expected: list[int]) -> None:
        async with room:
            await ask(mesh.channel, question, expected, result)

    async with asyncio.TaskGroup() as group:
        left = list(asked)
        while left:
            burst = min(rng.randint(1, 12), len(left))
            for _ in range(burst):
                group.create_task(ask_in_turn(*left.pop()))
            await asyncio.sleep(rng.expovariate(rate / burst))


def _questions(count: int, rng: random.Random) -> list[Question]:
    """Return prompts of a few blocks up to some twenty; each shares its beginning with an eighth of the others."""
    prefixes = [tuple(rng.choices(range(*_VOCABULARY), k=rng.randint(40, 160))) for _ in range(_PREFIXES)]
    return [
        Question((*rng.choice(prefixes), *rng.choices(range(*_VOCABULARY), k=rng.randint(20, 200))), rng.randint(4, 48))
        for _ in range(count)
    ]


async def _undisturbed(questions: Sequence[Question], model: Path) -> list[list[int]]:
    """Return what one process answers, that does its prefills itself."""
    at_once = asyncio.Semaphore(_IN_FLIGHT)
    async with (
        running_mesh(
            mesh__decode=1, mesh__prefill=0, engine__name="numpy_llama", engine__model=model,
            engine__options=ENGINE_OPTIONS | {"total_blocks": "4096"}, waits__request_s=_ALONE_S,
            waits__first_token_s=_ALONE_S, waits__token_gap_s=_ALONE_S,
        ) as mesh,
        open_frontend(mesh) as frontend,
    ):  # fmt: skip

        async def one(question: Question) -> list[int]:
            request = question.request()
            async with at_once:
                answer = await generate(frontend, request.prompt, sampling=request.sampling, timeout_s=_ALONE_S)
            return answer.token_ids

        return await asyncio.gather(*map(one, questions))


@dataclass(slots=True)
class _Attempt:
    """What one stream said."""

    tokens: list[int] = field(default_factory=list)
    finished: generation_pb2.Finished | None = None
    prefill: str = ""
    """Where its prefill ran, and why."""
    outcome: str = ""


async def ask(channel: grpc.aio.Channel, question: Question, expected: list[int], result: ChaosResult) -> None:
    """Ask one question, again where the connection to the gateway broke, and enter what came of it."""
    result.requests += 1
    for asked in range(1, _ASKED_AT_MOST + 1):
        attempt = _Attempt()
        await _stream(channel, question, attempt, result)
        if attempt.tokens != expected[: len(attempt.tokens)] or (attempt.finished and attempt.tokens != expected):
            result.wrong += 1
            result.details.append(f"wrong: {attempt.outcome}, prefill {attempt.prefill}: {attempt.tokens}, {expected}")
        if attempt.outcome != _DOOR_LOST or asked == _ASKED_AT_MOST:
            break
        result.asked_again += 1
    result.outcomes[attempt.outcome] += 1
    if attempt.outcome == _HUNG:
        result.hung += 1
        result.details.append(f"hung after {len(attempt.tokens)} tokens, prefill {attempt.prefill or 'unknown'}")


async def _stream(channel: grpc.aio.Channel, question: Question, attempt: _Attempt, result: ChaosResult) -> None:
    """Read one stream to its end into `attempt`."""
    frontend = frontend_pb2_grpc.FrontendStub(channel)
    try:
        async with asyncio.timeout(_DEADLINE_S + _BEYOND_S):
            async for response in frontend.Generate(question.request(), timeout=_DEADLINE_S, wait_for_ready=True):
                match response.WhichOneof("event"):
                    case "started":
                        attempt.prefill = response.started.prefill.reason
                    case "chunk":
                        attempt.tokens += response.chunk.token_ids
                    case "finished":
                        attempt.finished = response.finished
        attempt.outcome = _finished(attempt.finished, attempt.prefill)
        if attempt.finished is None:
            result.unexpected += 1
            result.details.append("a stream ended well without saying so")
    except TimeoutError:
        attempt.outcome = _HUNG
    except grpc.aio.AioRpcError as exc:
        attempt.outcome = _failed(exc, result)
        log.warning(
            "chaos.failed", outcome=attempt.outcome, tokens=len(attempt.tokens), prefill=attempt.prefill,
            error=exc.details(),
        )  # fmt: skip


def _failed(error: grpc.aio.AioRpcError, result: ChaosResult) -> str:
    """Return the outcome of a failed stream; enter a reason that no disturbance explains."""
    reason = from_rpc_error(error).reason
    if reason is Reason.DEADLINE:
        return _HUNG
    if not any(key == _DETAILS for key, _ in error.trailing_metadata() or ()):
        return _DOOR_LOST  # gRPC's own word, not the mesh's
    if reason not in _MAY_FAIL_WITH:
        result.unexpected += 1
        result.details.append(f"unexpected {reason.value}: {error.details()}")
    return f"failed_{reason.value.lower()}"


def _finished(finished: generation_pb2.Finished | None, prefill: str) -> str:
    if finished is None:
        return "unfinished"
    if finished.usage.remote_prefill_tokens:
        return "finished_remote"
    return "finished_fallback" if prefill.startswith("fallback") else "finished_local"


async def _wait_quiet(mesh: ChaosMesh, result: ChaosResult) -> None:
    """Wait until nobody holds anything, and enter what is held still after `_QUIET_S`."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _QUIET_S
    while True:
        try:
            held = await mesh.held()
        except grpc.aio.AioRpcError:  # too busy to answer in time: it is asked again
            if loop.time() >= until:
                raise
            continue
        result.leaks = {
            f"{holder} {kind}": count for holder, kinds in held.items() for kind, count in kinds.items() if count
        }
        if not result.leaks or loop.time() >= until:
            break
        await asyncio.sleep(_LOOK_AGAIN_S)
    result.leaked = sum(result.leaks.values())
    result.details += [f"leaked: {count} {what}" for what, count in result.leaks.items()]
