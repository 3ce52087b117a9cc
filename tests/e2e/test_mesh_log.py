"""What a mesh logs of each request, however it ends."""

import httpx
import structlog

from kvmesh.testing.mesh import read_baseline, running_mesh, wait_for_baseline


async def test_a_request_is_logged_once_at_its_end_under_both_ids() -> None:
    body = {"prompt": "abcd", "request_id": "mine", "sampling": {"max_tokens": 3}}
    async with running_mesh(engine__name="simulated", engine__speedup=0) as mesh:
        baseline = await read_baseline(mesh)
        url = f"http://{mesh.http_address}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as http:
            with structlog.testing.capture_logs() as logs:
                response = await http.post("/generate", json=body)
                await wait_for_baseline(mesh, baseline)

    (line,) = [line for line in logs if line["event"] == "request.ended"]
    assert (line["log_level"], line["outcome"], line["client_request_id"]) == ("info", "finished", "mine")
    assert line["worker_id"] in {"NODE1/decode/0", "NODE2/decode/1"}
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (4, 0, 3)
    assert response.status_code == 200


async def test_a_request_that_failed_is_logged_with_what_is_known_of_it() -> None:
    body = {"prompt": "abcd", "request_id": "mine", "model": "nobody's"}
    async with running_mesh(engine__name="simulated", engine__speedup=0) as mesh:
        url = f"http://{mesh.http_address}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as http:
            with structlog.testing.capture_logs() as logs:
                response = await http.post("/generate", json=body)

    (line,) = [line for line in logs if line["event"] == "request.ended"]
    assert (line["outcome"], line["client_request_id"], line["worker_id"]) == ("failed", "mine", None)
    assert response.status_code == 404
