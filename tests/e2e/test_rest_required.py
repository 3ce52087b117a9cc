"""What the OpenAPI document calls required, a running mesh refuses to do without; and the other way round."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from kvmesh.testing.mesh import running_mesh

QUERY = {"query": {"model": "echo", "text": "hello"}}
WHOLE: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "hello"},
    "/mesh/v1/generate": {"prompt": {"messages": {"messages": [{"role": "user", "content": "hello"}]}}},
    "/mesh/v1/router:explain": QUERY,
    "/mesh/v1/router:overlaps": QUERY,
    "/mesh/v1/router:potentialLoads": QUERY,
    "/mesh/v1/router:select": QUERY,
}
"""A request that has what is required and little else, by its route."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with (
        running_mesh(engine__name="echo") as mesh,
        httpx.AsyncClient(base_url=f"http://{mesh.http_address}", trust_env=False, timeout=30) as client,
    ):
        yield client


def requests_without(document: dict[str, Any], whole: Any, schema: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return (path of the field, the request without it) for every required field that a request has."""
    schema = document["components"]["schemas"].get(schema.get("$ref", "").rpartition("/")[2], schema)
    if isinstance(whole, list):
        inner = requests_without(document, whole[0], schema["items"])
        return [(f"[0].{path}", [less]) for path, less in inner]
    if not isinstance(whole, dict):
        return []
    found = []
    for name, value in whole.items():
        others = {key: one for key, one in whole.items() if key != name}
        if name in schema.get("required", ()):
            found.append((name, others))
        inner = requests_without(document, value, schema["properties"][name])
        found += [(f"{name}.{path}", {**others, name: less}) for path, less in inner]
    return found


@pytest.mark.asyncio(loop_scope="module")
async def test_every_route_that_needs_a_body_says_so(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()

    need_one = {
        path
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if operation.get("requestBody", {}).get("required")
    }
    assert need_one == set(WHOLE)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", sorted(WHOLE))
async def test_a_request_is_taken_with_what_is_required_and_refused_without_any_of_it(
    http: httpx.AsyncClient, path: str
) -> None:
    document = (await http.get("/openapi.json")).json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]

    whole = await http.post(path, json=WHOLE[path])
    without = {
        field: (await http.post(path, json=less)).status_code
        for field, less in requests_without(document, WHOLE[path], schema)
    }

    assert whole.status_code == 200
    assert without
    assert set(without.values()) == {400}
