"""Schemathesis reads the document that a running mesh serves and sends what it allows and what it does not: none of it
may be an error of the server, and every answer must be what the document says.

What it may not conclude: that a message which fits its schema is accepted (a prompt may be empty by its type, and no
worker is called what it makes up), and that a path has the verbs of one of its templates alone.
"""

import asyncio
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import httpx
import pytest

from kvmesh.testing.mesh import running_mesh

SCHEMATHESIS = Path(__file__).parents[2] / ".venv-judges" / "bin" / "schemathesis"
NOT_CONCLUDED = "positive_data_acceptance,allow_header_conformance,unsupported_method"
BOUND_S = 120
# A watch ends by its deadline alone: it is tried by requests that are refused.
SETTINGS = """
headers = { Grpc-Timeout = "20S" }

[[operations]]
include-path-regex = ":watch$"
headers = { Grpc-Timeout = "2S" }
generation.mode = "negative"
"""

pytestmark = [
    pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="schemathesis is not installed: make install-judges"),
    pytest.mark.timeout(2 * BOUND_S),
]


async def test_no_request_is_an_error_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    async with running_mesh(engine__name="echo") as mesh:
        async with httpx.AsyncClient(base_url=f"http://{mesh.http_address}", trust_env=False, timeout=30) as client:
            paths = (await client.get("/openapi.json")).json()["paths"]
        operations = sum(len(verbs) for verbs in paths.values())
        process = await asyncio.create_subprocess_exec(
            SCHEMATHESIS, "run", f"http://{mesh.http_address}/openapi.json", "--phases", "fuzzing",
            "--seed", "20261121", "--max-examples", "8", "--exclude-checks", NOT_CONCLUDED,
            "--suppress-health-check", "all", "--request-timeout", "30", "--continue-on-failure", "--no-color",
            stdout=PIPE, stderr=STDOUT, cwd=tmp_path,
        )  # fmt: skip
        async with asyncio.timeout(BOUND_S):
            said, _ = await process.communicate()

    assert process.returncode == 0, said.decode()
    assert f"Tested: {operations}\n" in said.decode()
