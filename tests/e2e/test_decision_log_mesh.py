"""The decisions of a running mesh, logged and taken again by `kvmesh explain`."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvmesh.cli.main import main
from kvmesh.testing.mesh import generate, open_frontend, running_mesh

MESH: dict[str, Any] = {"engine__name": "simulated", "mesh__decode": 3, "mesh__prefill": 0}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVMESH_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def explained(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `kvmesh explain` and return its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # the log of the mesh
        with pytest.raises(SystemExit) as end:
            main(["explain", *map(str, arguments)])
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return run


async def record(path: Path, requests: int = 30, **settings: Any) -> list[str]:
    """Run requests of a few prompts through a mesh; return the workers that served them."""
    async with running_mesh(**MESH, router__decision_log=str(path), **settings) as mesh, open_frontend(mesh) as stub:
        answers = []
        for first in range(0, requests, 10):
            answers += await asyncio.gather(
                *(generate(stub, f"Prompt {number % 4}. " * 40) for number in range(first, first + 10))
            )
    return [answer.started.worker_id for answer in answers]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router__temperature": 1.0, "router__request_weight": 2.0},
        {"router__imbalance_absolute": 1, "router__imbalance_relative": 1.0},
        {"router__policy": "least_work"},
        {"router__policy": "least_loaded"},
        {"router__policy": "random"},
        {"router__policy": "round_robin"},
    ],
    ids=lambda settings: ",".join(f"{key[8:]}={value}" for key, value in settings.items()) or "default",
)
async def test_a_recorded_log_comes_out_the_same(tmp_path: Path, explained: Any, settings: dict[str, Any]) -> None:
    path = tmp_path / "decisions.jsonl"
    served = await record(path, **settings)

    code, out, _ = explained(path, "--json")

    report = json.loads(out)
    logged = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert (code, report["decisions"], report["same"]) == (0, 30, 30)
    assert (report["different"], report["bad_lines"]) == ([], [])
    assert sorted(line["worker_id"] for line in logged) == sorted(served)


async def test_another_policy_shows_where_it_differs_and_is_no_failure(tmp_path: Path, explained: Any) -> None:
    path = tmp_path / "decisions.jsonl"
    await record(path, 10)

    code, out, _ = explained(path, "--policy", "round_robin")
    one_code, one, _ = explained(path, "--line", 2)

    assert code == 0
    assert out.startswith("10 decisions taken again: ")
    assert one_code == 0
    assert "policy least_work (backlog_weight 0.3" in one
    assert all(f"NODE{number}/decode/{number - 1}" in one for number in (1, 2, 3))


async def test_a_log_that_was_tampered_with_is_told_by_line(tmp_path: Path, explained: Any) -> None:
    path = tmp_path / "decisions.jsonl"
    await record(path, 10)
    lines = path.read_text().splitlines()
    altered = json.loads(lines[3])
    wrong = next(name for name in altered["candidates"]["worker_id"] if name != altered["worker_id"])
    lines[3] = json.dumps({**altered, "worker_id": wrong})
    lines[5] = "{"
    lines[6] = '{"version": 1}'
    path.write_text("\n".join(lines) + "\n")

    code, out, err = explained(path)
    json_code, as_json, _ = explained(path, "--json")

    assert (code, json_code) == (1, 1)
    assert "8 decisions taken again: 7 the same, 1 otherwise" in out
    assert [row["line"] for row in json.loads(as_json)["different"]] == [4]
    assert [row["line"] for row in json.loads(as_json)["bad_lines"]] == [6, 7]
    assert "line 6: no JSON" in err


async def test_a_limit_is_kept_and_what_is_not_there_is_said(tmp_path: Path, explained: Any) -> None:
    path = tmp_path / "decisions.jsonl"
    await record(path, 10)

    limited = json.loads(explained(path, "--json", "--limit", 4)[1])
    no_file, _, no_file_says = explained(tmp_path / "none.jsonl")
    no_policy, _, no_policy_says = explained(path, "--policy", "kv_awre")
    no_line, _, no_line_says = explained(path, "--line", 1)

    assert limited["decisions"] == 4
    assert (no_file, "No such file" in no_file_says) == (2, True)
    assert (no_policy, "the nearest is kv_aware" in no_policy_says) == (2, True)
    assert (no_line, "line 1 is no decision" in no_line_says) == (1, True)
