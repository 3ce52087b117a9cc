"""The document of the REST routes and its page over a real server, and services that come while it runs."""

import asyncio
import re
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor

from kvmesh.gateway.app import HttpApp, create_app
from kvmesh.gateway.server import HttpServer
from kvmesh.testing.canned_servicer import CannedServicer
from kvmesh.testing.no_generator import NoGenerator
from kvmesh.v1 import frontend_pb2, router_pb2, worker_control_pb2

VALIDATOR = Path(__file__).parents[2] / ".venv-judges" / "bin" / "openapi-spec-validator"
SERVICES = [
    frontend_pb2.DESCRIPTOR.services_by_name["Frontend"],
    router_pb2.DESCRIPTOR.services_by_name["Router"],
    worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"],
]


@asynccontextmanager
async def open_door() -> AsyncIterator[tuple[HttpApp, httpx.AsyncClient]]:
    app = create_app(
        services=[(service, CannedServicer(service)) for service in SERVICES],
        generator=NoGenerator(),
        unready_reason=lambda: None,
    )
    server = HttpServer(app, host="127.0.0.1", port=0)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://{server.address}", trust_env=False, timeout=30) as client:
        yield app, client
    await server.stop(0)


def joining(path: str, *, name: str = "Talk", field: str = "word") -> ServiceDescriptor:
    """Return a service of a pool of its own, whose method answers with its request at `path`."""
    file = descriptor_pb2.FileDescriptorProto(name="joining.proto", package="joining", syntax="proto3")
    file.message_type.add(name="Said").field.add(name=field, number=1, type=9, label=1)
    method = file.service.add(name=name).method.add(name="Say", input_type=".joining.Said", output_type=".joining.Said")
    method.options.Extensions[annotations_pb2.http].CopyFrom(http_pb2.HttpRule(post=path, body="*"))
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindServiceByName(f"joining.{name}")


@pytest.mark.skipif(not VALIDATOR.exists(), reason="the validator is not installed: make install-judges")
async def test_the_document_is_valid_openapi(tmp_path: Path) -> None:
    async with open_door() as (app, client):
        talk = joining("/talk")
        app.rest.add(talk, CannedServicer(talk))
        document = tmp_path / "openapi.json"
        document.write_text((await client.get("/openapi.json")).text)

    validator = await asyncio.create_subprocess_exec(VALIDATOR, document, stdout=PIPE, stderr=STDOUT)
    said, _ = await validator.communicate()

    assert validator.returncode == 0, said.decode()


async def test_every_reference_of_the_document_leads_somewhere() -> None:
    async with open_door() as (_, client):
        response = await client.get("/openapi.json")

    document = response.json()
    references = set(re.findall(r'"\$ref":"#/components/(\w+)/([^"]+)"', response.text))
    assert response.headers["content-type"] == "application/json"
    assert document["openapi"] == "3.1.0"
    assert len(references) > 20
    assert [name for kind, name in references if name not in document["components"][kind]] == []


async def test_a_service_that_joins_is_served_and_in_the_document() -> None:
    async with open_door() as (app, client):
        before = (await client.post("/sdk/v1/talk", json={"word": "hi"})).status_code
        talk = joining("/sdk/v1/talk")

        app.rest.add(talk, CannedServicer(talk), comments={"joining.Talk.Say": "Say it."})
        answer = await client.post("/sdk/v1/talk", json={"word": "hi"})
        document = (await client.get("/openapi.json")).json()

    assert (before, answer.status_code, answer.json()) == (404, 200, {"word": "hi"})
    assert document["paths"]["/sdk/v1/talk"]["post"]["description"] == "Say it."
    assert set(document["components"]["schemas"]["joining.Said"]["properties"]) == {"word"}


async def test_a_service_that_joins_again_replaces_itself() -> None:
    async with open_door() as (app, client):
        older, newer = joining("/older"), joining("/newer", field="phrase")
        app.rest.add(older, CannedServicer(older))

        app.rest.add(newer, CannedServicer(newer))
        gone = await client.post("/older", json={})
        answer = await client.post("/newer", json={"phrase": "hi"})

    assert (gone.status_code, answer.json()) == (404, {"phrase": "hi"})


async def test_a_service_that_leaves_is_served_no_longer() -> None:
    async with open_door() as (app, client):
        talk = joining("/talk")
        app.rest.add(talk, CannedServicer(talk))

        app.rest.remove(talk.full_name)
        app.rest.remove(talk.full_name)
        answer = await client.post("/talk", json={})
        paths = (await client.get("/openapi.json")).json()["paths"]

    assert answer.status_code == 404
    assert "/talk" not in paths
    assert "/generate" in paths


async def test_a_service_cannot_take_the_path_of_another() -> None:
    async with open_door() as (app, client):
        thief = joining("/generate", name="Thief")

        with pytest.raises(ValueError, match="share POST /generate"):
            app.rest.add(thief, CannedServicer(thief))
        answer = await client.post("/generate", json={"prompt": "x"})

    assert set(answer.json()) >= {"worker_output"}


@pytest.mark.parametrize(
    ("path", "media_type"),
    [("/docs", "text/html"), ("/docs/page.css", "text/css"), ("/docs/page.js", "text/javascript")],
)
async def test_the_page_is_served_whole_by_the_gateway(path: str, media_type: str) -> None:
    async with open_door() as (_, client):
        response = await client.get(path)

    assert response.status_code == 200
    assert response.headers["content-type"].startswith(media_type)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert re.findall(r"https?://", response.text) == []
    assert [link for link in re.findall(r'(?:src|href)="([^"]+)"', response.text) if not link.startswith("/")] == []
