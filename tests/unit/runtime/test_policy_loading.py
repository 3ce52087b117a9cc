"""From the name of a policy to the policy, and what is said where there is none."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.policies.kv_aware import CostKnobs
from kvmesh.core.policies.least_work import LeastWork, LeastWorkKnobs
from kvmesh.core.policies.policy import BUILTIN_POLICIES, Policy, name_of
from kvmesh.runtime import policy_loading
from kvmesh.runtime.policy_loading import load_policies, load_policy
from kvmesh.runtime.router_settings import RouterSettings

MODULE = """
class Mine:
    name = "mine"

    def __init__(self, weight="1"):
        self.weight = float(weight)

    def select(self, query, candidates, rng):
        return candidates[0].worker


class NoSelect:
    pass


class Namespace:
    Inner = Mine


number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module that nobody else has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("policy_of_a_test", "broken_policy_of_a_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "policy_of_a_test.py").write_text(MODULE)
    (tmp_path / "broken_policy_of_a_test.py").write_text("import no_such_package_at_all")
    return tmp_path


def load(policy: str, **options: str) -> Policy:
    return load_policy(RouterSettings(policy=policy, policy_options=options))


def refusal_of(policy: str, **options: str) -> FixRequestError:
    with pytest.raises(FixRequestError) as refused:
        load(policy, **options)
    assert refused.value.reason is Reason.INVALID_FIELD
    return refused.value


@pytest.mark.parametrize("name", BUILTIN_POLICIES)
def test_every_policy_of_the_mesh_is_found_by_its_name(name: str) -> None:
    assert name_of(load(name)) == name


def test_the_guard_is_off_unless_its_bound_is_set() -> None:
    free, guarded = (load_policy(RouterSettings(imbalance_absolute=bound)) for bound in (None, 5))

    assert isinstance(free, LeastWork)
    assert isinstance(guarded, LeastWork)
    assert vars(free)["_guard"] is None
    assert (vars(guarded)["_guard"].absolute, vars(guarded)["_guard"].relative) == (5, 2.0)


def test_weights_that_are_not_set_are_the_policys_own() -> None:
    of_kv_aware = vars(load_policy(RouterSettings(policy="kv_aware", overlap_credit=0.5)))["_knobs"]
    own = RouterSettings(policy="least_work", request_weight=2, policy_options={"held_weight": "0.25"})
    of_least_work = vars(load_policy(own))["_knobs"]

    assert of_kv_aware == CostKnobs(overlap_credit=0.5)
    assert of_least_work == LeastWorkKnobs(request_weight=2, held_weight=0.25)


def test_an_option_of_the_similarity_policy_reaches_it() -> None:
    assert vars(load("prompt_similarity", threshold="0.25"))["_threshold"] == 0.25


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (RouterSettings(policy="kv_aware", policy_options={"held_weight": "1"}), "router.policy_options.held_weight"),
        (RouterSettings(policy="least_work", policy_options={"held_wait": "1"}), "router.policy_options.held_wait"),
        (RouterSettings(policy="least_work", policy_options={"held_weight": "x"}), "router.policy_options.held_weight"),
        (RouterSettings(policy="random", imbalance_absolute=1), "router.imbalance_absolute"),
        (RouterSettings(policy="random", policy_options={"weight": "1"}), "router.policy_options.weight"),
    ],
)
def test_a_knob_that_the_policy_has_not_is_refused(settings: RouterSettings, field: str) -> None:
    with pytest.raises(FixRequestError) as refused:
        load_policy(settings)

    assert refused.value.field == field


@pytest.mark.parametrize("policy", ["least_work", "kv_aware"])
def test_a_weight_given_as_an_option_is_answered_with_its_setting(policy: str) -> None:
    refused = refusal_of(policy, overlap_credit="2")

    assert refused.message == (
        f"{policy} has no option 'overlap_credit'; "
        "that weight is a setting: router.overlap_credit, in a file or as KVMESH_ROUTER__OVERLAP_CREDIT"
    )


def test_a_weight_given_as_an_option_of_several_is_answered_with_its_setting() -> None:
    settings = RouterSettings(policy_options={"request_weight": "2"})

    with pytest.raises(FixRequestError, match=r"has an option 'request_weight'; that weight is a setting: router\.req"):
        load_policies(settings, ["kv_aware", "random"])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["policy_of_a_test:Mine", "policy_of_a_test:Namespace.Inner"])
def test_a_class_of_a_module_in_the_working_directory_is_made_with_its_options(name: str) -> None:
    policy = load(name, weight="0.5")

    assert (name_of(policy), vars(policy)["weight"]) == ("mine", 0.5)


@pytest.mark.usefixtures("folder")
def test_an_entry_point_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("theirs", "policy_of_a_test:Mine", "kvmesh.policies")
    monkeypatch.syspath_prepend(".")
    monkeypatch.setattr(policy_loading, "entry_points", lambda *, group: [entry] if group == entry.group else [])

    assert name_of(load("theirs")) == "mine"
    assert "the nearest is theirs" in refusal_of("theirz").message


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("kv_awre", "the nearest is kv_aware"),
        ("no_such_module_at_all:Mine", "no module is called 'no_such_module_at_all'"),
        ("policy_of_a_test.inner:Mine", "no module is called 'policy_of_a_test.inner'"),
        ("broken_policy_of_a_test:Mine", "cannot be imported: ModuleNotFoundError"),
        ("policy_of_a_test:Mime", "has no 'Mime'; the nearest is Mine"),
        ("policy_of_a_test:NoSelect", "without a method select(query, candidates, rng)"),
        ("policy_of_a_test:number", "is a int, not a class"),
        ("policy_of_a_test:", "is not MODULE:CLASS"),
        (":Mine", "is not MODULE:CLASS"),
    ],
)
def test_what_is_no_policy_is_refused_saying_what_to_change(policy: str, says: str) -> None:
    refused = refusal_of(policy)

    assert says in refused.message
    assert refused.field == "router.policy"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("policy", "options", "says"),
    [
        ("policy_of_a_test:Mine", {"wait": "3"}, "Mine(wait='3') failed: TypeError"),
        ("policy_of_a_test:Mine", {"weight": "much"}, "failed: ValueError"),
    ],
)
def test_options_that_a_policy_does_not_take_are_refused(policy: str, options: dict[str, str], says: str) -> None:
    refused = refusal_of(policy, **options)

    assert says in refused.message
    assert refused.field == "router.policy_options"


@pytest.mark.usefixtures("folder")
def test_of_several_policies_each_takes_the_options_and_the_guard_that_it_has() -> None:
    settings = RouterSettings(
        imbalance_absolute=5, temperature=0.5, policy_options={"weight": "3", "held_weight": "0.25"}
    )

    mine, turns, least_work = load_policies(settings, ["policy_of_a_test:Mine", "round_robin", "least_work"])

    assert vars(mine)["weight"] == 3.0
    assert name_of(turns) == "round_robin"
    assert vars(least_work)["_knobs"] == LeastWorkKnobs(temperature=0.5, held_weight=0.25)
    assert vars(least_work)["_guard"].absolute == 5


def test_a_guard_that_none_of_several_policies_has_is_refused() -> None:
    with pytest.raises(FixRequestError) as refused:
        load_policies(RouterSettings(imbalance_absolute=5), ["round_robin", "random"])

    assert refused.value.field == "router.imbalance_absolute"
