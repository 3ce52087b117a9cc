"""From a reply to the log lines of its request."""

import httpx
import structlog

from kvmesh.testing.mesh import running_mesh


async def test_workers_log_a_request_under_the_id_on_its_reply() -> None:
    with structlog.testing.capture_logs() as logs:
        async with running_mesh(mesh__decode=1, mesh__prefill=1) as mesh:
            url = f"http://{mesh.http_address}/generate"
            async with httpx.AsyncClient(trust_env=False) as client:
                reply = await client.post(
                    url, json={"prompt": "hello", "request_id": "1"}, headers={"x-request-id": "2"}
                )

    leased = [line["request_id"] for line in logs if line["event"] == "prefill.leased"]
    assert reply.json()["request_id"] == "1"
    assert reply.headers["x-client-request-id"] == "2"
    assert leased == [reply.headers["x-request-id"]]
