"""What a browser may be made to send without its user's knowledge is refused; what tools send is not."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from kvmesh.gateway.app import create_app
from kvmesh.gateway.server import HttpServer
from kvmesh.testing.no_generator import NoGenerator
from kvmesh.v1 import worker_control_pb2, worker_control_pb2_grpc

DRAIN = "/mesh/v1/workers/NODE1/decode/0:drain"
BODY = b"{}"


class WorkerControl(worker_control_pb2_grpc.WorkerControlServicer):
    """Counts what comes through."""

    def __init__(self) -> None:
        self.drained = 0

    async def Drain(
        self, request: worker_control_pb2.DrainRequest, context: object
    ) -> worker_control_pb2.DrainResponse:
        self.drained += 1
        return worker_control_pb2.DrainResponse()


@asynccontextmanager
async def open_door(host: str = "127.0.0.1") -> AsyncIterator[tuple[WorkerControl, httpx.AsyncClient]]:
    control = WorkerControl()  # type: ignore[abstract]  # GetInfo is left to the generated class
    app = create_app(
        services=[(worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"], control)],
        generator=NoGenerator(),
        unready_reason=lambda: None,
    )
    server = HttpServer(app, host=host, port=0)
    await server.start()
    url = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
        yield control, client
    await server.stop(0)


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://127.0.0.1:3000", "http://localhost", "null", "http://127.0.0.1.evil.example"],
)
async def test_a_page_of_another_origin_is_refused_whatever_it_sends(origin: str) -> None:
    async with open_door() as (control, client):
        posted = await client.post(DRAIN, content=BODY, headers={"origin": origin})
        read = await client.get("/healthz", headers={"origin": origin})

    assert (posted.status_code, read.status_code) == (403, 403)
    assert posted.json()["details"][0]["metadata"]["field"] == "origin"
    assert control.drained == 0


async def test_a_page_of_the_mesh_s_own_origin_is_served() -> None:
    async with open_door() as (control, client):
        response = await client.post(DRAIN, content=BODY, headers={"origin": str(client.base_url).rstrip("/")})

    assert response.status_code == 200
    assert control.drained == 1


async def test_the_default_port_may_be_left_out_of_either() -> None:
    headers = {"host": "localhost:80", "origin": "http://localhost"}
    async with open_door() as (control, client):
        response = await client.post(DRAIN, content=BODY, headers=headers)

    assert response.status_code == 200
    assert control.drained == 1


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.7", "[::2]:1"])
async def test_a_foreign_host_is_refused_on_loopback(host: str) -> None:
    async with open_door() as (control, client):
        response = await client.post(DRAIN, content=BODY, headers={"host": host})

    assert response.status_code == 403
    assert response.json()["details"][0]["metadata"]["field"] == "host"
    assert control.drained == 0


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "mesh.localhost:1", "127.8.9.1:1", "[::1]", "[::1]:8000"]
)
async def test_every_name_of_loopback_is_served_on_loopback(host: str) -> None:
    async with open_door() as (control, client):
        response = await client.post(DRAIN, content=BODY, headers={"host": host})

    assert response.status_code == 200
    assert control.drained == 1


async def test_beyond_loopback_any_host_is_served() -> None:
    async with open_door("0.0.0.0") as (control, client):
        response = await client.post(DRAIN, content=BODY, headers={"host": "mesh.example"})

    assert response.status_code == 200
    assert control.drained == 1


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/plain;charset=UTF-8",
        "multipart/form-data; boundary=x",
        "application/octet-stream",
        "application/jsonp",
        "application/json; charset=latin-1",
        "",
    ],
)
async def test_a_body_that_says_it_is_no_json_is_refused(content_type: str) -> None:
    async with open_door() as (control, client):
        response = await client.post(DRAIN, content=BODY, headers={"content-type": content_type})

    assert response.status_code == 415
    assert response.json()["details"][0]["metadata"]["field"] == "content-type"
    assert control.drained == 0


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "application/json"},
        {"content-type": 'Application/JSON; charset="UTF-8"'},
        {"content-type": "application/vnd.mesh+json"},
        {"content-type": "application/x-www-form-urlencoded"},
    ],
    ids=["none", "JSON", "JSON in UTF-8", "a kind of JSON", "curl -d"],
)
async def test_what_tools_say_of_json_is_taken(headers: dict[str, str]) -> None:
    async with open_door() as (control, client):
        response = await client.post(DRAIN, content=BODY, headers=headers)

    assert response.status_code == 200
    assert control.drained == 1


async def test_the_openai_api_refuses_in_its_own_form() -> None:
    async with open_door() as (_, client):
        response = await client.post("/v1/completions", content=BODY, headers={"origin": "https://evil.example"})

    assert response.status_code == 403
    assert response.json()["error"]["param"] == "origin"
