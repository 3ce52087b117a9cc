"""A popular program that speaks the OpenAI API, as it is installed: Simon Willison's `llm`."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvmesh.testing.mesh_process import MeshProcess

ROOT = Path(__file__).parents[2]
LLM = ROOT / ".venv-programs" / "bin" / "llm"
WITHIN_S = 60.0
pytestmark = [
    pytest.mark.skipif(not LLM.exists(), reason="llm is not installed: `make install-programs`"),
    pytest.mark.timeout(180),
]


@pytest.fixture(scope="module")
def mesh() -> Iterator[MeshProcess]:
    with MeshProcess("--engine", "echo", "--node-names", "NODE1") as mesh:
        yield mesh


@pytest.fixture
def llm(mesh: MeshProcess, tmp_path: Path) -> Any:
    """Return `llm(*arguments)`: its exit status and what it wrote, on a profile of its own that knows the mesh."""
    url = f"{mesh.http_url}/v1"
    models = [
        {"model_id": "mesh", "model_name": "echo", "api_base": url},
        {"model_id": "mesh-text", "model_name": "echo", "api_base": url, "completion": True},
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | {
        "LLM_USER_PATH": str(tmp_path),
        "OPENAI_API_KEY": "unused",
        "NO_COLOR": "1",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [LLM, *arguments], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=WITHIN_S, check=False,
        )  # fmt: skip

    return run


def test_llm_prints_what_the_mesh_answers_and_continues_the_conversation(llm: Any) -> None:
    first = llm("prompt", "-m", "mesh", "--usage", "Tell me a joke")
    second = llm("prompt", "-c", "--no-stream", "Another one")

    assert (first.returncode, first.stdout.strip()) == (0, "Tell me a joke_GeneratedBy_NODE1"), first.stderr
    assert f"{len('Tell me a joke')} input, 4 output" in first.stderr
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip().splitlines() == [
        "user: Tell me a joke",
        "assistant: Tell me a joke_GeneratedBy_NODE1",
        "user: Another one_GeneratedBy_NODE1",
    ]


def test_llm_uses_plain_completions_too(llm: Any) -> None:
    answer = llm("prompt", "-n", "-m", "mesh-text", "-o", "max_tokens", "2", "one two three")

    assert (answer.returncode, answer.stdout.strip()) == (0, "one two"), answer.stderr


def test_llm_shows_what_the_mesh_refuses(llm: Any) -> None:
    answer = llm("prompt", "-n", "-m", "mesh", "-o", "frequency_penalty", "1", "hello")

    assert answer.returncode != 0
    assert "frequency_penalty" in answer.stderr
