"""Router.Exchange: many questions on one stream, and the client that asks them for a processor."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import status_pb2
from prometheus_client import REGISTRY

from kvmesh.core.admission import AdmissionRules
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.errors import FixRequestError, MeshError, NotKnownError, Reason, TryElsewhereError
from kvmesh.core.ids import RouterId
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.routing import RoutingRules
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.router import Router
from kvmesh.services.router_exchange_client import RouterExchangeClient
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.v1 import generation_pb2, router_pb2, router_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error, from_status
from kvmesh.wire.validation import duration

if TYPE_CHECKING:
    from kvmesh.v1.router_pb2_grpc import RouterAsyncStub

WAIT_S = 20.0
QUERY = router_pb2.RoutingQuery(model="m", token_ids=generation_pb2.TokenIds(token_ids=range(64)))
SELECT = router_pb2.SelectRequest(query=QUERY)
NO_ROOM = RoutingRules(overload=OverloadRules(max_prefill_tokens=0))
"""One request's prompt is as much as a worker may have before it."""

Question = router_pb2.RouterQuestion


@dataclass(slots=True)
class Served:
    """A router with one worker, and a channel to it."""

    worker: ScriptedWorker
    local: LocalRouter
    service: Router
    server: grpc.aio.Server
    calls: CallInterceptor
    channel: grpc.aio.Channel
    stub: "RouterAsyncStub"

    def active_requests(self) -> int:
        return sum(worker.reservations for worker in self.local.workers())

    async def settled(self, *, active: int, waiting: int = 0) -> None:
        async with asyncio.timeout(WAIT_S):
            while (self.active_requests(), self.local.waiting) != (active, waiting):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # nothing says that a booking ended

    def client(self, on_end: Any = lambda _ended: None) -> RouterExchangeClient:
        return RouterExchangeClient(self.stub.Exchange(), write_timeout_s=WAIT_S, on_end=on_end)


@asynccontextmanager
async def served(
    *, waits: Waits | None = None, options: Sequence[tuple[str, int]] = (), **router: Any
) -> AsyncIterator[Served]:
    discovery = MemoryDiscovery()
    async with AsyncExitStack() as stack:
        worker = await ScriptedWorker.start(discovery, 0)
        stack.push_async_callback(worker.aclose)
        local = LocalRouter(
            discovery=discovery, namespace="default", router_id=RouterId("router-1"),
            policy=build_policy("kv_aware"), rng=random.Random(3), **router,
        )  # fmt: skip
        local.start()
        stack.push_async_callback(local.aclose)
        service = Router(local, waits=waits or Waits(route_s=0.05))
        calls = CallInterceptor()
        server = grpc.aio.server(interceptors=[calls], options=options)
        router_pb2_grpc.add_RouterServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, None)
        stack.callback(service.close)
        async with asyncio.timeout(WAIT_S):
            while not (states := local.workers()) or not states[0].report:
                await local.changed()
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        yield Served(worker, local, service, server, calls, channel, router_pb2_grpc.RouterStub(channel))


def waits_ended(wait: str) -> float:
    return REGISTRY.get_sample_value("kvmesh_wait_ended_total", {"wait": wait}) or 0.0


def refusal(answer: router_pb2.RouterAnswer) -> MeshError:
    return from_status(status_pb2.Status.FromString(answer.failed.SerializeToString()))


def reserve(request_id: str) -> router_pb2.ReserveRequest:
    return router_pb2.ReserveRequest(request_id=request_id, attempt=1, query=QUERY)


def release(request_id: str) -> router_pb2.RouterReleaseRequest:
    return router_pb2.RouterReleaseRequest(key=router_pb2.ReservationKey(request_id=request_id, attempt=1))


def asking(*questions: Question) -> router_pb2.RouterExchangeRequest:
    return router_pb2.RouterExchangeRequest(questions=questions)


async def all_answers(
    mesh: Served, questions: Iterable[Question], withdrawn: Iterable[int] = ()
) -> list[router_pb2.RouterAnswer]:
    """Ask in one message, half-close, and read to the end."""
    call = mesh.stub.Exchange(timeout=WAIT_S)
    await call.write(router_pb2.RouterExchangeRequest(questions=questions, withdrawn=withdrawn))
    await call.done_writing()
    return [answer async for response in call for answer in response.answers]


async def write_for_ever(call: Any, request: router_pb2.RouterExchangeRequest) -> None:
    while True:
        await call.write(request)


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def end_of(call: Any) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_to_the_end(call)
    return from_rpc_error(caught.value).reason


async def test_every_kind_of_question_is_answered_as_its_call_would_be() -> None:
    async with served() as mesh:
        booked = await all_answers(
            mesh, [Question(question_id=1, select=SELECT), Question(question_id=2, reserve=reserve("r"))]
        )
        alone = await mesh.stub.Reserve(reserve("r"), timeout=WAIT_S)
        progress = router_pb2.ReservationProgress(request_id="nobody", attempt=1, prefill_complete=True)
        rest = await all_answers(
            mesh,
            [
                Question(question_id=3, report_progress=router_pb2.ReportProgressRequest(progress=[progress])),
                Question(question_id=4, release=release("r")),
            ],
        )

    by_id = {answer.question_id: answer for answer in (*booked, *rest)}
    assert by_id[1].select.worker.worker_id == "node/decode/0"
    assert by_id[2].reserve == alone  # the same key and content: the same booking
    assert by_id[3].report_progress.unknown == [router_pb2.ReservationKey(request_id="nobody", attempt=1)]
    assert by_id[4].WhichOneof("answer") == "release"


async def test_a_question_that_is_refused_fails_alone() -> None:
    unknown_model = router_pb2.SelectRequest(query=router_pb2.RoutingQuery(model="x", prompt_tokens=1))
    async with served() as mesh:
        answers = await all_answers(
            mesh,
            [
                Question(question_id=1, select=unknown_model),
                Question(question_id=2, release=release("nobody")),
                Question(question_id=3, reserve=router_pb2.ReserveRequest(attempt=1, query=QUERY)),
                Question(question_id=4),
                Question(question_id=5, reserve=reserve("r"), timeout=duration(0)),
                Question(question_id=6, select=SELECT),
            ],
        )

    errors = {answer.question_id: refusal(answer) for answer in answers if answer.HasField("failed")}
    assert {one: (error.reason, error.field) for one, error in errors.items()} == {
        1: (Reason.UNKNOWN_MODEL, "query.model"),
        2: (Reason.NOT_FOUND, None),
        3: (Reason.INVALID_FIELD, "request_id"),
        4: (Reason.INVALID_FIELD, "questions[3].question"),
        5: (Reason.INVALID_FIELD, "questions[4].timeout"),
    }
    assert next(answer for answer in answers if answer.question_id == 6).HasField("select")


async def test_without_an_id_a_question_is_done_and_not_answered() -> None:
    async with served() as mesh:
        booked = await all_answers(mesh, [Question(reserve=reserve("r1")), Question(reserve=reserve("r2"))])
        await mesh.settled(active=2)
        released = await all_answers(mesh, [Question(release=release("r1")), Question(release=release("nobody"))])
        await mesh.settled(active=1)

    assert booked == released == []


async def test_a_question_does_not_wait_for_the_reserve_before_it() -> None:
    async with served(rules=NO_ROOM, admission=AdmissionRules(wait_s=WAIT_S)) as mesh:
        await mesh.stub.Reserve(reserve("holds the room"), timeout=WAIT_S)
        answers = await all_answers(
            mesh,
            [
                Question(question_id=1, reserve=reserve("waits")),
                Question(question_id=2, release=release("holds the room")),
            ],
        )

    assert [answer.question_id for answer in answers] == [2, 1]
    assert answers[1].reserve.worker.worker_id == "node/decode/0"


async def test_a_withdrawn_reserve_is_given_up() -> None:
    async with served(rules=NO_ROOM, admission=AdmissionRules(wait_s=WAIT_S)) as mesh:
        await mesh.stub.Reserve(reserve("holds the room"), timeout=WAIT_S)
        call = mesh.stub.Exchange(timeout=WAIT_S)
        await call.write(asking(Question(question_id=7, reserve=reserve("waits"))))
        await mesh.settled(active=1, waiting=1)
        await call.write(router_pb2.RouterExchangeRequest(withdrawn=[7, 8]))
        answered: Any = await call.read()
        await mesh.settled(active=1, waiting=0)

    assert [refusal(answer).reason for answer in answered.answers] == [Reason.CANCELLED]


async def test_a_reserve_that_waits_is_withdrawn_by_the_message_that_asks() -> None:
    async with served(rules=NO_ROOM, admission=AdmissionRules(wait_s=WAIT_S)) as mesh:
        await mesh.stub.Reserve(reserve("holds the room"), timeout=WAIT_S)
        answers = await all_answers(mesh, [Question(question_id=7, reserve=reserve("waits"))], withdrawn=[7])
        await mesh.settled(active=1, waiting=0)

    assert [refusal(answer).reason for answer in answers] == [Reason.CANCELLED]


async def test_questions_are_taken_in_their_order_where_none_waits() -> None:
    async with served() as mesh:
        answers = await all_answers(
            mesh, [Question(question_id=1, reserve=reserve("r")), Question(question_id=2, release=release("r"))]
        )
        active = mesh.active_requests()

    assert [answer.WhichOneof("answer") for answer in answers] == ["reserve", "release"]
    assert active == 0


async def test_a_reserve_waits_for_room_no_longer_than_its_timeout() -> None:
    async with served(rules=NO_ROOM, admission=AdmissionRules(wait_s=WAIT_S)) as mesh:
        await mesh.stub.Reserve(reserve("holds the room"), timeout=WAIT_S)
        answers = await all_answers(mesh, [Question(question_id=1, reserve=reserve("waits"), timeout=duration(0.3))])

    assert [refusal(answer).reason for answer in answers] == [Reason.OVERLOADED]


async def test_a_reserve_waits_for_a_worker_no_longer_than_its_timeout() -> None:
    async with served(waits=Waits(route_s=10 * WAIT_S)) as mesh:
        await mesh.worker.stop()
        async with asyncio.timeout(WAIT_S):
            while mesh.local.workers():
                await mesh.local.changed()
        answers = await all_answers(mesh, [Question(question_id=1, reserve=reserve("waits"), timeout=duration(0.3))])

    assert [refusal(answer).reason for answer in answers] == [Reason.DEADLINE]


async def test_an_id_that_waits_already_ends_the_exchange_and_what_waits_on_it() -> None:
    async with served(rules=NO_ROOM, admission=AdmissionRules(wait_s=WAIT_S)) as mesh:
        await mesh.stub.Reserve(reserve("holds the room"), timeout=WAIT_S)
        call = mesh.stub.Exchange(timeout=WAIT_S)
        await call.write(
            router_pb2.RouterExchangeRequest(questions=[Question(question_id=1, reserve=reserve("waits"))])
        )
        await mesh.settled(active=1, waiting=1)
        await call.write(router_pb2.RouterExchangeRequest(questions=[Question(question_id=1, select=SELECT)]))
        reason = await end_of(call)
        await mesh.settled(active=1, waiting=0)

    assert reason is Reason.INVALID_FIELD


async def test_a_client_that_leaves_gives_up_what_it_waits_for() -> None:
    async with served(rules=NO_ROOM, admission=AdmissionRules(wait_s=WAIT_S)) as mesh:
        await mesh.stub.Reserve(reserve("holds the room"), timeout=WAIT_S)
        call = mesh.stub.Exchange(timeout=WAIT_S)
        await call.write(
            router_pb2.RouterExchangeRequest(questions=[Question(question_id=1, reserve=reserve("waits"))])
        )
        await mesh.settled(active=1, waiting=1)
        call.cancel()
        await mesh.settled(active=1, waiting=0)


async def test_a_client_that_does_not_read_is_left() -> None:
    refused = router_pb2.RouterExchangeRequest(
        questions=[Question(question_id=number, release=release("nobody")) for number in range(1, 100)]
    )
    async with served(waits=Waits(exchange_write_s=0.2)) as mesh:
        before = waits_ended("exchange_write_s")
        call = mesh.stub.Exchange(timeout=WAIT_S)
        writing = asyncio.ensure_future(write_for_ever(call, refused))
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait([writing], timeout=0.1)  # by then the call is open
            await mesh.calls.wait_idle()
        given_up = waits_ended("exchange_write_s") - before
        call.cancel()
        await asyncio.wait([writing], timeout=WAIT_S)

    assert given_up == 1


async def test_too_many_questions_in_a_message_end_the_exchange() -> None:
    async with served() as mesh:
        call = mesh.stub.Exchange(timeout=WAIT_S)
        await call.write(asking(*[Question()] * 1025))
        reason = await end_of(call)

    assert reason is Reason.INVALID_FIELD


async def test_answers_are_split_into_messages_that_every_client_takes() -> None:
    long = router_pb2.ReportProgressRequest(
        progress=[
            router_pb2.ReservationProgress(request_id=f"nobody {number:0200}", attempt=1) for number in range(100)
        ]
    )
    async with served() as mesh:
        call = mesh.stub.Exchange(timeout=WAIT_S)
        for first in range(1, 201, 100):  # messages of half of what the server takes
            numbers = range(first, first + 100)
            await call.write(asking(*[Question(question_id=number, report_progress=long) for number in numbers]))
        await call.done_writing()
        responses = [response async for response in call]

    sizes = [response.ByteSize() for response in responses]
    assert sum(sizes) > 4 << 20
    assert max(sizes) < (1 << 20) + 1024
    assert sorted(answer.question_id for response in responses for answer in response.answers) == list(range(1, 201))


async def test_a_message_that_does_not_parse_ends_the_exchange_with_a_reason() -> None:
    async with served() as mesh:
        call: Any = mesh.channel.stream_stream("/kvmesh.v1.Router/Exchange")(timeout=WAIT_S)
        await call.write(b"\xff\xff\xff\xff")
        reason = await end_of(call)

    assert reason is Reason.INVALID_FIELD


async def test_a_router_that_closes_hears_of_what_nobody_waits_for() -> None:
    async with served(rules=NO_ROOM, admission=AdmissionRules(wait_s=WAIT_S)) as mesh:
        await mesh.stub.Reserve(reserve("holds the room"), timeout=WAIT_S)
        call = mesh.stub.Exchange(timeout=WAIT_S)
        await call.write(asking(Question(reserve=reserve("waits"))))
        await call.done_writing()
        await mesh.settled(active=1, waiting=1)
        mesh.service.close()
        reason = await end_of(call)
        await mesh.settled(active=1, waiting=0)

    assert reason is Reason.DRAINING


async def test_a_router_that_closes_ends_the_exchange() -> None:
    async with served() as mesh:
        call = mesh.stub.Exchange(timeout=WAIT_S)
        await call.write(router_pb2.RouterExchangeRequest(questions=[Question(question_id=1, select=SELECT)]))
        answered: Any = await call.read()
        mesh.service.close()
        reason = await end_of(call)

    assert len(answered.answers) == 1
    assert reason is Reason.DRAINING


async def test_the_client_gives_each_question_its_answer() -> None:
    async with served() as mesh:
        client = mesh.client()
        refused = client.ask(Question(release=release("nobody")))
        booked = [client.ask(Question(reserve=reserve(f"r{number}"))) for number in range(200)]
        answers = await asyncio.gather(*booked)
        with pytest.raises(NotKnownError):
            await refused
        for number in range(200):
            client.tell(Question(release=release(f"r{number}")))
        await mesh.settled(active=0)
        await client.aclose()

    assert len({answer.reserve.reservation_id for answer in answers}) == 200


async def test_the_client_splits_what_would_be_more_than_a_server_takes() -> None:
    long = router_pb2.SelectRequest(query=QUERY)
    long.query.prompt_text = "x" * (3 << 20)
    async with served(options=[("grpc.max_receive_message_length", 8 << 20)]) as mesh:
        client = mesh.client()
        answers = await asyncio.gather(*(client.ask(Question(select=long)) for _ in range(6)))
        await client.aclose()

    assert [answer.WhichOneof("answer") for answer in answers] == ["select"] * 6


async def test_an_answer_nobody_waits_for_is_withdrawn() -> None:
    async with served(rules=NO_ROOM, admission=AdmissionRules(wait_s=WAIT_S)) as mesh:
        client = mesh.client()
        await client.ask(Question(reserve=reserve("holds the room")))
        waits = client.ask(Question(reserve=reserve("waits")))
        await mesh.settled(active=1, waiting=1)
        waits.cancel()
        await mesh.settled(active=1, waiting=0)
        client.tell(Question(release=release("holds the room")))
        await mesh.settled(active=0)
        await client.aclose()


async def test_a_question_that_is_given_up_before_it_is_sent_is_not_sent() -> None:
    async with served(rules=NO_ROOM, admission=AdmissionRules(wait_s=WAIT_S)) as mesh:
        client = mesh.client()
        held = client.ask(Question(reserve=reserve("holds the room")))
        others = [client.ask(Question(select=SELECT)) for _ in range(200)]  # more than one message takes
        unsent = client.ask(Question(reserve=reserve("waits")))
        unsent.cancel()
        await held
        await asyncio.gather(*others, return_exceptions=True)
        await client.ask(Question(report_progress=router_pb2.ReportProgressRequest()))
        waiting = mesh.local.waiting
        await client.aclose()

    assert waiting == 0


async def test_a_booking_that_arrives_too_late_is_released() -> None:
    async with served() as mesh:
        client = mesh.client()
        await client.ask(Question(select=SELECT))
        late = client.ask(Question(reserve=reserve("r")))
        async with asyncio.timeout(WAIT_S):
            while mesh.active_requests() == 0:  # noqa: ASYNC110  # booked, and its answer not read yet
                await asyncio.sleep(0)
        late.cancel()
        await mesh.settled(active=0)
        await client.aclose()


async def test_an_exchange_that_breaks_fails_what_is_asked_then_and_later() -> None:
    ended: list[RouterExchangeClient] = []
    async with served(rules=NO_ROOM, admission=AdmissionRules(wait_s=WAIT_S)) as mesh:
        client = mesh.client(ended.append)
        await client.ask(Question(reserve=reserve("holds the room")))
        waits = client.ask(Question(reserve=reserve("waits")))
        await mesh.settled(active=1, waiting=1)
        await mesh.server.stop(None)
        with pytest.raises(TryElsewhereError):
            await asyncio.wait_for(waits, WAIT_S)
        with pytest.raises(TryElsewhereError) as later:
            await client.ask(Question(select=SELECT))
        await client.aclose()

    assert ended == [client]
    assert later.value.reason is Reason.WORKER_LOST


async def test_a_question_the_contract_does_not_allow_raises_what_its_call_would() -> None:
    async with served() as mesh:
        client = mesh.client()
        with pytest.raises(FixRequestError) as caught:
            await client.ask(Question(select=router_pb2.SelectRequest()))
        await client.aclose()

    assert caught.value.field == "query.model"
