"""The hello world as its reader types it: `kvmesh up`, then the four curl calls, aggregated and disaggregated."""

import json
import shutil
import subprocess

import httpx
import pytest

from kvmesh.testing.mesh_process import WAIT_S, MeshProcess

# (prompt, node that answers): the first two prompts find an empty worker each, the others the more similar one.
LANDINGS = [
    ("Tell me a joke", "NODE1"),
    ("Which team won 2020 World Series", "NODE2"),
    ("Tell me a fact", "NODE1"),
    ("This is prefill disagg serving example", "NODE1"),
]
FLAGS = ("--engine", "echo", "--policy", "prompt_similarity", "--decode", "2", "--node-names", "NODE1,NODE2")


def post(url: str, body: dict[str, str]) -> str:
    """Send what the walk-through sends, and return the body of the answer."""
    headers = {"accept": "text/event-stream", "content-type": "application/json"}
    if shutil.which("curl") is None:
        return httpx.post(url, json=body, headers=headers, timeout=WAIT_S, trust_env=False).text
    flags = [flag for name, value in headers.items() for flag in ("-H", f"{name}: {value}")]
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--noproxy", "*", "-X", "POST", url, *flags, "-d", json.dumps(body)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("prefill", [0, 1], ids=["aggregated", "disaggregated"])
def test_the_four_prompts_are_answered_by_the_listed_nodes(prefill: int) -> None:
    with MeshProcess(*FLAGS, "--prefill", str(prefill)) as mesh:
        answers = [
            post(f"{mesh.http_url}/generate", {"prompt": prompt, "request_id": "id_number"}) for prompt, _ in LANDINGS
        ]

        assert mesh.stop() == 0
        assert answers == [
            f'{{"worker_output":"{prompt}_GeneratedBy_{node}","request_id":"id_number"}}' for prompt, node in LANDINGS
        ]
        assert len(mesh.logged("prefill.leased")) == prefill * len(LANDINGS)
        assert mesh.stray_lines == []


def test_the_prefill_worker_logs_each_task_it_takes_and_completes() -> None:
    with MeshProcess(*FLAGS, "--prefill", "1") as mesh:
        for prompt, _ in LANDINGS:
            post(f"{mesh.http_url}/generate", {"prompt": prompt, "request_id": "id_number"})

        assert mesh.stop() == 0
        leased = mesh.logged("prefill.leased", worker_id="NODE1/prefill/0")
        completed = mesh.logged("prefill.completed", worker_id="NODE1/prefill/0")
        assert len(leased) == len(LANDINGS)
        assert len({line["request_id"] for line in leased}) == len(LANDINGS)
        assert [line["request_id"] for line in completed] == [line["request_id"] for line in leased]
        assert not any(prompt in json.dumps(line) for line in mesh.log for prompt, _ in LANDINGS)
