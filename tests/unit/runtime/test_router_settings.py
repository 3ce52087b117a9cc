"""What the settings of the router become."""

import os
from pathlib import Path
from typing import Any

import pytest

from kvmesh.core.admission import AdmissionOrder, AdmissionRules
from kvmesh.core.approximate_index import ApproximateIndex
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.index_port import IndexMode, NoIndex
from kvmesh.core.policies.round_robin import RoundRobin
from kvmesh.core.prefix_index import PrefixIndex
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.composition import Composition
from kvmesh.runtime.router_role import RouterPlan
from kvmesh.runtime.router_settings import RouterSettings
from kvmesh.runtime.settings import SettingsError, load_settings


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVMESH_")]:
        monkeypatch.delenv(name)


def plan_of(**overrides: Any) -> RouterPlan:
    settings = load_settings(overrides={f"router.{key}": value for key, value in overrides.items()}).settings
    return Composition(settings, discovery=MemoryDiscovery()).router_plan()


def test_by_default_nobody_is_overloaded_nobody_waits_and_nothing_is_logged() -> None:
    plan = plan_of()

    assert plan.rules.overload == OverloadRules()
    assert plan.admission == AdmissionRules()
    assert plan.rules.index_mode is IndexMode.EVENTS
    assert isinstance(plan.index, PrefixIndex)
    assert plan.decision_log is None


def test_the_thresholds_reach_the_rules() -> None:
    plan = plan_of(max_block_usage=0.9, max_prefill_tokens=50_000, max_requests_per_slot=2, max_waiting_requests=0)

    assert plan.rules.overload == OverloadRules(
        max_block_usage=0.9, max_prefill_tokens=50_000, max_requests_per_slot=2.0, max_waiting_requests=0
    )


def test_the_wait_and_its_order_reach_the_rules() -> None:
    plan = plan_of(
        admission_wait_s=3, admission_order="shortest", admission_max_waiting=5, admission_ageing_s=2, session_ttl_s=7
    )

    assert plan.admission == AdmissionRules(wait_s=3, order=AdmissionOrder.SHORTEST, max_waiting=5, ageing_s=2)
    assert plan.rules.session_ttl_s == 7


@pytest.mark.parametrize(("mode", "kind"), [("approximate", ApproximateIndex), ("off", NoIndex)])
def test_the_index_is_of_the_kind_that_is_named(mode: str, kind: type) -> None:
    plan = plan_of(index=mode)

    assert isinstance(plan.index, kind)
    assert plan.rules.index_mode is IndexMode(mode)


def test_every_router_has_a_policy_and_an_index_of_its_own() -> None:
    settings = load_settings(overrides={"router.policy": "round_robin"}).settings
    make = Composition(settings, discovery=MemoryDiscovery())
    make.check()

    first, second = make.router_plan(), make.router_plan()

    assert isinstance(first.policy, RoundRobin)
    assert first.policy is not second.policy
    assert first.index is not second.index


def test_options_of_a_policy_come_from_every_source_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[router.policy_options]\nweight = 3\nfast = true\nname = 'file'\n")
    monkeypatch.setenv("KVMESH_ROUTER__POLICY_OPTIONS__NAME", "env")

    loaded = load_settings(config_file=file, overrides={"router.policy_options.depth": "4"})

    assert loaded.settings.router.policy_options == {"weight": "3", "fast": "true", "name": "env", "depth": "4"}
    assert loaded.origins["router.policy_options.depth"] == "flag"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("admission_wait_s", -1, "0 to 86400"),
        ("admission_max_waiting", 0, "1 to 100000"),
        ("imbalance_relative", 0.5, "1 to 1000000"),
        ("decision_log_max_mb", 0, "0.01 to 100000"),
        ("admission_order", "lifo", "'fcfs', 'priority' or 'shortest'"),
        ("index", "event", "'events', 'approximate' or 'off'"),
    ],
)
def test_a_value_out_of_range_is_answered_with_the_range(key: str, value: object, says: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        load_settings(overrides={f"router.{key}": value})

    assert f"router.{key} = {value!r} (flag)" in str(refusal.value)
    assert says in str(refusal.value)


def test_what_the_policy_is_made_of_makes_it_again() -> None:
    settings = RouterSettings(policy="kv_aware", temperature=0.5, imbalance_absolute=3, admission_wait_s=9)

    again = RouterSettings(**settings.of_the_policy())

    assert again == RouterSettings(policy="kv_aware", temperature=0.5, imbalance_absolute=3)


def test_the_settings_of_a_mesh_of_processes_survive_their_file() -> None:
    given = {"router.index": "off", "router.admission_order": "priority", "router.decision_log": "log.jsonl"}
    settings = load_settings(overrides=given).settings

    tree = settings.model_dump(mode="json")

    assert load_settings(
        overrides={key: value for key, value in _flat(tree).items() if value is not None}
    ).settings == (settings)


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, values in tree.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
