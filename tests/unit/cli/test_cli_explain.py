"""`kvmesh explain`: what if another policy, or other weights, had decided."""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmesh.cli.main import main
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.decision_log import Decision, decision_to_mapping
from kvmesh.core.ids import Epoch, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.policies.kv_aware import KvAware
from kvmesh.core.policies.policy import Policy
from kvmesh.core.policies.round_robin import RoundRobin
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore

A, B = (WorkerRank(WorkerId(name)) for name in ("a", "b"))
POLICIES = """
class Raises:
    def select(self, query, candidates, rng):
        raise RuntimeError("no idea")


class Nan:
    name = "nan"

    def select(self, query, candidates, rng):
        from kvmesh.core.candidates import Scored, Selection
        scores = [Scored(candidates[0].worker, 1.0), Scored(candidates[1].worker, float("nan"))]
        return Selection(worker=candidates[0].worker, policy=self.name, scores=scores)


class Takes:
    def __init__(self, at="0"):
        self.at = int(at)

    def select(self, query, candidates, rng):
        return candidates[self.at].worker
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with policies of one's own, and no settings."""
    for name in [name for name in os.environ if name.startswith("KVMESH_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "explained_policies", raising=False)
    (tmp_path / "explained_policies.py").write_text(POLICIES)
    return tmp_path


def write_log(path: Path, policy: Policy, settings: dict[str, Any], *, before: str = "") -> None:
    """Write one decision: a prompt of 8 full blocks, all of which `b` has cached."""
    core = RoutingCore(RouterId("r"), policy=policy, rng=random.Random(5))
    for worker in (A, B):
        core.put_worker(WorkerRecord(worker_id=worker.worker_id, epoch=Epoch(7), models=("m",), block_size=16), now=0)
    hashes = {16: [SequenceHash(number) for number in range(1, 9)]}
    core.apply_kv_stored(B, Epoch(7), parent=None, block_hashes=hashes[16], now=0)
    query = RoutingQuery(model="m", prompt_tokens=130, block_hashes=hashes)
    decision = Decision(selection=core.select(query, now=1), policy_settings=settings, at_s=0)
    path.write_text(before + json.dumps(decision_to_mapping(decision)) + "\n")


@pytest.fixture
def log(folder: Path) -> Path:
    path = folder / "decisions.jsonl"
    write_log(path, KvAware(), {"policy": "kv_aware"})
    return path


@pytest.fixture
def explained(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `kvmesh explain` and return its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["explain", *map(str, arguments)])
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return run


def test_the_settings_are_the_weights_of_the_policy_that_is_asked(
    log: Path, explained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads(explained(log, "--policy", "kv_aware", "--line", 1, "--json")[1])
    monkeypatch.setenv("KVMESH_ROUTER__OVERLAP_CREDIT", "0.25")

    code, out, _ = explained(log, "--policy", "kv_aware", "--line", 1, "--json")

    after = json.loads(out)
    assert code == 0
    # 130 tokens are 8.125 blocks, 8 of them cached, and 8 new ones to hold
    assert (before["now"], before["now_cost"]) == ("b", 8.125 - 8 + 8)
    assert (after["logged_cost"], after["now_cost"]) == (8.125 - 8 + 8, 8.125 - 2 + 8)
    assert after["explanation"]["knobs"]["overlap_credit"] == 0.25


def test_weights_of_the_log_hold_where_no_setting_changes_them(
    folder: Path, explained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "decisions.jsonl"
    write_log(path, KvAware(), {"policy": "kv_aware", "prefill_scale": 3})
    monkeypatch.setenv("KVMESH_ROUTER__REQUEST_WEIGHT", "2")

    _, own, _ = explained(path, "--policy", "kv_aware", "--line", 1, "--json")
    _, other, _ = explained(path, "--policy", "least_work", "--line", 1, "--json")

    knobs = json.loads(own)["explanation"]["knobs"]
    assert (knobs["prefill_scale"], knobs["request_weight"]) == (3, 2)
    assert json.loads(other)["explanation"]["knobs"]["prefill_scale"] == 1


def test_options_are_those_of_the_policy_that_is_asked(log: Path, explained: Any) -> None:
    own = ("--policy", "explained_policies:Takes", "--policy-option")

    first = json.loads(explained(log, "--line", 1, "--json", *own, "at=0")[1])
    second = json.loads(explained(log, "--line", 1, "--json", *own, "at=1")[1])

    assert (first["now"], first["now_cost"], first["same"]) == ("a", None, False)
    assert (second["now"], second["same"]) == ("b", True)
    assert [each["cost"] for each in second["explanation"]["candidates"]] == [None, None]
    assert second["explanation"]["policy"] == "Takes"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policy", "kv_awre"], "the nearest is kv_aware"),
        (["--policy", "kv_aware", "--policy-option", "weight=1"], "kv_aware has no option 'weight'"),
        (["--policy", "least_work", "--policy-option", "crowd_weight=x"], "crowd_weight = 'x' is no number"),
        (["--policy", "explained_policies:Takes", "--policy-option", "at=x"], "at='x'"),
        (["--policy-option", "at=x"], "--policy names"),
    ],
)
def test_a_wrong_flag_is_refused_and_no_line_is_blamed(log: Path, explained: Any, flags: list[str], said: str) -> None:
    code, out, err = explained(log, *flags)

    assert (code, out) == (2, "")
    assert said in err
    assert "line 1" not in err


def test_a_wrong_setting_is_refused_by_name(log: Path, explained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_ROUTER__OVERLAP_CREDIT", "-1")

    code, _, err = explained(log, "--policy", "kv_aware")

    assert code == 2
    assert "KVMESH_ROUTER__OVERLAP_CREDIT" in err
    assert "out of range" in err


@pytest.mark.parametrize(
    ("policy", "fault"),
    [
        ("explained_policies:Raises", "Raises raised RuntimeError('no idea')"),
        ("explained_policies:Nan", "nan gave b a cost of nan"),
    ],
)
def test_of_a_policy_that_fails_the_fallback_is_shown_with_its_costs(
    log: Path, explained: Any, policy: str, fault: str
) -> None:
    code, out, _ = explained(log, "--line", 1, "--policy", policy)
    row = json.loads(explained(log, "--policy", policy, "--json")[1])["different"][0]

    lines = out.splitlines()
    assert code == 0
    assert lines[1].split()[:2] == ["b", "8.125"]
    assert lines[2].split()[:2] == ["a", "16.125"]
    assert f"the policy failed, the lowest cost was taken: {fault}" in out
    assert (row["now"], row["now_cost"]) == ("b", 8.125)


def test_a_logged_fallback_is_asked_again_of_another_policy(folder: Path, explained: Any) -> None:
    class Raises:
        def select(self, *_: object) -> WorkerRank:
            raise RuntimeError("no idea")

    path = folder / "decisions.jsonl"
    write_log(path, Raises(), {"policy": "explained_policies:Raises"})

    own = explained(path, "--line", 1)
    other = json.loads(
        explained(path, "--line", 1, "--json", "--policy", "explained_policies:Takes", "--policy-option", "at=0")[1]
    )

    assert own[0] == 0
    assert "the lowest cost was taken: Raises raised RuntimeError('no idea')" in own[1]
    assert other["now"] == "a"


def test_prompt_similarity_cannot_be_asked_again(folder: Path, log: Path, explained: Any) -> None:
    asked = explained(log, "--policy", "prompt_similarity")
    write_log(log, RoundRobin(), {"policy": "prompt_similarity"})
    own = explained(log)

    for code, out, err in (asked, own):
        assert (code, out) == (2, "")
        assert err.count("prompt_similarity cannot be asked again") == 1
    assert explained(log, "--policy", "round_robin")[0] == 0


def test_a_line_of_a_policy_that_cannot_be_asked_again_is_shown_as_it_was_logged(log: Path, explained: Any) -> None:
    write_log(log, RoundRobin(), {"policy": "prompt_similarity"})

    code, out, err = explained(log, "--line", 1)
    as_json = json.loads(explained(log, "--line", 1, "--json")[1])

    assert code == 0
    assert {line.split()[0] for line in out.splitlines()[1:3]} == {"a", "b"}
    assert err.startswith("shown as it was logged: prompt_similarity cannot be asked again")
    assert as_json["logged"] == as_json["explanation"]["worker_id"] == json.loads(log.read_text())["worker_id"]
    assert (as_json["now"], as_json["same"]) == (None, None)


@pytest.mark.parametrize("policy", ["kv_aware", "prompt_similarity"])
def test_a_line_beyond_the_end_is_answered_with_how_many_there_are(log: Path, explained: Any, policy: str) -> None:
    write_log(log, KvAware(), {"policy": policy}, before="\n")

    assert explained(log, "--line", 3) == (2, "", f"error: {log}: no such line: the file has 2\n")


def test_a_policy_without_costs_shows_none(folder: Path, explained: Any) -> None:
    path = folder / "decisions.jsonl"
    write_log(path, RoundRobin(), {"policy": "round_robin"})

    code, out, _ = explained(path, "--line", 1)

    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["a", "-"], ["b", "-"]]


def test_blank_lines_are_none_and_keep_their_number(folder: Path, explained: Any) -> None:
    path = folder / "decisions.jsonl"
    write_log(path, KvAware(), {"policy": "kv_aware"}, before="\n  \n")

    assert explained(path)[0] == 0
    assert explained(path, "--line", 3)[0] == 0
    assert "line 2 is no decision" in explained(path, "--line", 2)[2]


def test_a_line_that_cannot_be_read_says_why_where_it_is_asked_for(folder: Path, explained: Any) -> None:
    path = folder / "decisions.jsonl"
    write_log(path, KvAware(), {"policy": "kv_aware"}, before="{\n")

    assert "line 1 is no decision: no JSON" in explained(path, "--line", 1)[2]
    assert explained(path, "--line", 2)[0] == 0
