"""What travels beside a message over REST: metadata both ways, a status that a servicer sets, errors among events."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from grpc_status import rpc_status

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.gateway.app import create_app
from kvmesh.gateway.rest_context import RestContext
from kvmesh.gateway.server import HttpServer
from kvmesh.services.channels import Channels
from kvmesh.services.forwarded import ForwardedService
from kvmesh.testing.canned_servicer import FAIL_KEY, CannedServicer
from kvmesh.testing.no_generator import NoGenerator
from kvmesh.v1 import frontend_pb2, router_pb2

FRONTEND = frontend_pb2.DESCRIPTOR.services_by_name["Frontend"]
ROUTER = router_pb2.DESCRIPTOR.services_by_name["Router"]


class Frontend(CannedServicer):
    """Does with the context what a test asks for, then answers."""

    def __init__(self) -> None:
        super().__init__(FRONTEND)
        self.use: Any = None
        self.error_after: Exception | None = None

    async def ListModels(
        self, request: frontend_pb2.ListModelsRequest, context: RestContext
    ) -> frontend_pb2.ListModelsResponse:
        await self.use(context)
        return frontend_pb2.ListModelsResponse()

    async def WatchTopology(
        self, request: frontend_pb2.WatchTopologyRequest, context: RestContext
    ) -> AsyncIterator[frontend_pb2.WatchTopologyResponse]:
        await self.use(context)
        yield frontend_pb2.WatchTopologyResponse()
        if self.error_after is not None:
            raise self.error_after


async def nothing(context: RestContext) -> None:
    """Use no context."""


@asynccontextmanager
async def open_door(*services: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(services=services, generator=NoGenerator(), unready_reason=lambda: None)
    server = HttpServer(app, host="127.0.0.1", port=0)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://{server.address}", trust_env=False, timeout=30) as client:
        yield client
    await server.stop(0)


@pytest.mark.parametrize("path", ["/mesh/v1/models", "/mesh/v1/topology:watch"])
async def test_headers_are_the_metadata_of_the_call_and_metadata_sent_back_is_headers(path: str) -> None:
    frontend, seen = Frontend(), {}

    async def use(context: RestContext) -> None:
        seen.update(dict(context.invocation_metadata()))
        await context.send_initial_metadata([("served-by", "a")])
        context.set_trailing_metadata([("cost-bin", b"\x00\xff")])

    frontend.use = use
    async with open_door((FRONTEND, frontend)) as client:
        headers = {"grpc-metadata-tenant": "t", "traceparent": "00-0af7-b7ad-01", "cookie": "secret=1"}
        response = await client.get(path, headers=headers)

    assert (seen["tenant"], seen["traceparent"]) == ("t", "00-0af7-b7ad-01")
    assert not {"cookie", "host", "accept", "connection"} & seen.keys()
    assert response.headers["grpc-metadata-served-by"] == "a"
    assert response.headers["grpc-trailer-cost-bin"] == "AP8="


@pytest.mark.parametrize("path", ["/mesh/v1/models", "/mesh/v1/topology"])
async def test_a_header_that_can_be_no_metadata_is_refused(path: str) -> None:
    frontend = Frontend()
    frontend.use = nothing
    async with open_door((FRONTEND, frontend)) as client:
        response = await client.get(path, headers={"grpc-metadata-key-bin": "%"})

    assert response.status_code == 400
    assert response.json()["details"][0]["metadata"]["field"] == "grpc-metadata-key-bin"


async def test_headers_beyond_what_grpc_takes_are_refused() -> None:
    async with open_door((FRONTEND, Frontend())) as client:
        response = await client.get("/mesh/v1/topology", headers={"x-long": "a" * 9000})

    assert response.status_code == 431
    assert "8192 bytes" in response.json()["message"]


async def test_a_status_that_a_servicer_sets_ends_the_call() -> None:
    frontend = Frontend()

    async def use(context: RestContext) -> None:
        context.set_code(grpc.StatusCode.NOT_FOUND)
        context.set_details("no such model")

    frontend.use = use
    async with open_door((FRONTEND, frontend)) as client:
        whole = await client.get("/mesh/v1/models")
        streamed = await client.get("/mesh/v1/topology:watch")

    told = {"code": 5, "message": "no such model", "details": []}
    assert (whole.status_code, whole.json()) == (404, told)
    assert (streamed.status_code, json.loads(streamed.text.splitlines()[-1])) == (200, {"error": told})


async def test_an_error_within_a_stream_of_events_is_its_last_event() -> None:
    frontend = Frontend()
    frontend.use, frontend.error_after = nothing, TryElsewhereError(Reason.WORKER_LOST, "")
    async with open_door((FRONTEND, frontend)) as client:
        response = await client.get("/mesh/v1/topology:watch", headers={"accept": "text/event-stream"})

    first, last, end = response.text.split("\n\n")
    assert (response.status_code, end) == (200, "")
    assert list(json.loads(first.removeprefix("data: "))) == ["result"]
    assert json.loads(last.removeprefix("data: "))["error"]["details"][0]["reason"] == "WORKER_LOST"


async def test_an_error_before_the_first_event_is_a_status() -> None:
    async with open_door((ROUTER, CannedServicer(ROUTER))) as client:
        response = await client.get(
            "/mesh/v1/router/index", headers={"accept": "text/event-stream", "grpc-metadata-x-fail-with": "14"}
        )

    assert (response.status_code, response.headers["content-type"]) == (503, "application/json")


async def test_a_status_code_that_nobody_knows_is_an_error_of_the_server() -> None:
    frontend = Frontend()

    async def use(context: RestContext) -> None:
        status = rpc_status.status_pb2.Status(code=77, message="?")
        trailer = ("grpc-status-details-bin", status.SerializeToString())
        await context.abort(grpc.StatusCode.UNKNOWN, "", (trailer,))

    frontend.use = use
    async with open_door((FRONTEND, frontend)) as client:
        response = await client.get("/mesh/v1/models")

    assert response.status_code == 500


async def test_a_forwarded_call_carries_its_metadata_on() -> None:
    elsewhere = grpc.aio.server()
    elsewhere.add_generic_rpc_handlers([CannedServicer(ROUTER).handlers()])
    port = elsewhere.add_insecure_port("127.0.0.1:0")
    await elsewhere.start()
    channels = Channels()
    forwarded = ForwardedService(ROUTER, address=lambda: f"127.0.0.1:{port}", channels=channels)

    async with open_door((ROUTER, forwarded)) as client:
        answered = await client.get("/mesh/v1/router/workers")
        failed = await client.get("/mesh/v1/router/workers", headers={f"Grpc-Metadata-{FAIL_KEY}": "9"})
        failed_stream = await client.get("/mesh/v1/router/index", headers={FAIL_KEY: "9"})
        patient = [
            await client.get(f"/mesh/v1/router/{path}", headers={"grpc-timeout": "99999999H"})
            for path in ("workers", "index")
        ]
    await channels.aclose()
    await elsewhere.stop(0)

    assert answered.status_code == 200
    assert (failed.status_code, failed_stream.status_code) == (400, 400)
    assert [reply.status_code for reply in patient] == [200, 200]
    assert failed.json()["message"].endswith("Ünable, 100%")
