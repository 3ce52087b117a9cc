"""Policies of other people in a running mesh: the example, and one that fails."""

import sys
from pathlib import Path

import pytest

from kvmesh.core.errors import FixRequestError
from kvmesh.telemetry import exposition
from kvmesh.testing.mesh import generate, open_frontend, running_mesh
from kvmesh.testing.mesh_process import MeshProcess, run_kvmesh
from kvmesh.v1 import router_pb2

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_router"
PROMPT = "Tell me a joke about caches. " * 20
FAULTY = """
from kvmesh.core.ids import WorkerRank


class Raises:
    def select(self, query, candidates, rng):
        raise RuntimeError("no idea")


class NamesTheDead:
    def select(self, query, candidates, rng):
        return WorkerRank("a worker that died")
"""


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("custom_router", "faulty_policies_of_a_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def fallbacks(policy: str) -> float:
    line = f'kvmesh_routing_fallbacks_total{{policy="{policy}"}} '
    found = [text for text in exposition().decode().splitlines() if text.startswith(line)]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


async def test_the_example_routes_and_its_costs_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    async with (
        running_mesh(
            engine__name="simulated",
            mesh__decode=3,
            mesh__prefill=0,
            router__policy="custom_router:CostFunctionRouter",
            router__policy_options__overlap_weight="3",
        ) as mesh,
        open_frontend(mesh) as frontend,
    ):
        first = await generate(frontend, PROMPT)
        again = await generate(frontend, PROMPT, explain=True)

    explanation = again.started.explanation
    assert again.started.worker_id == first.started.worker_id
    assert explanation.policy == "custom_router"
    assert [candidate.lost == "" for candidate in explanation.candidates] == [True, False, False]
    assert explanation.candidates[0].cost < -2.5  # nearly the whole prompt, thrice
    assert explanation.fallback == ""


def test_the_command_of_the_example_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    flags = ("--engine", "simulated", "--policy", "custom_router:CostFunctionRouter")
    with MeshProcess(*flags, "--policy-option", "overlap_weight=3") as mesh:
        shown = run_kvmesh("generate", "Tell me a joke", "--explain", "--target", mesh.grpc_address)
        status = run_kvmesh("status", "--target", mesh.grpc_address)

    assert shown.returncode == 0
    assert "policy custom_router: least cost" in shown.stderr
    assert "predicted by custom_router" in status.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--policy", "kv_awre"), "no policy is named 'kv_awre'; the nearest is kv_aware"),
        (("--policy", "custom_router:Router"), "has no 'Router'; known: CostFunctionRouter"),
        (
            ("--policy", "custom_router:CostFunctionRouter", "--policy-option", "wait=1"),
            "CostFunctionRouter(wait='1') failed: TypeError",
        ),
        (("--policy-option", "wait"), "'wait' is not KEY=VALUE, e.g. weight=0.5"),
    ],
)
def test_a_policy_that_cannot_be_had_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(EXAMPLE)

    refused = run_kvmesh("up", "--http-port", "0", "--grpc-port", "0", *flags)

    assert refused.returncode == 2
    assert says in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [("Raises", "raised RuntimeError('no idea')"), ("NamesTheDead", "which is no candidate")],
)
async def test_a_policy_that_fails_costs_a_fallback_a_log_line_and_a_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, why: str
) -> None:
    (tmp_path / "faulty_policies_of_a_test.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    before = fallbacks(name)
    async with (
        running_mesh(
            engine__name="simulated", mesh__prefill=0, router__policy=f"faulty_policies_of_a_test:{name}"
        ) as mesh,
        open_frontend(mesh) as frontend,
    ):
        answer = await generate(frontend, PROMPT, explain=True)

    out = "".join(capsys.readouterr())
    assert answer.finished is not None
    assert why in answer.started.explanation.fallback
    assert answer.started.explanation.policy == "kv_aware"
    assert "policy.failed" in out
    assert fallbacks(name) == before + 1


async def test_a_policy_that_is_not_there_stops_the_mesh_before_it_starts() -> None:
    with pytest.raises(FixRequestError, match="no module is called 'nowhere_at_all'"):
        async with running_mesh(router__policy="nowhere_at_all:Policy"):
            raise AssertionError("it started")


async def test_knobs_of_one_request_override_those_of_the_router() -> None:
    async with (
        running_mesh(engine__name="simulated", mesh__prefill=0, router__request_weight=2.0) as mesh,
        open_frontend(mesh) as frontend,
    ):
        answer = await generate(
            frontend, PROMPT, explain=True, routing={"cost": {"request_weight": 7, "temperature": 0.5}}
        )

    knobs = dict(answer.started.explanation.knobs)
    assert (knobs["request_weight"], knobs["temperature"]) == (7.0, 0.5)
    assert (knobs["overlap_credit"], knobs["prefill_scale"]) == (1.0, 1.0)
    assert isinstance(answer.started.explanation, router_pb2.Explanation)
