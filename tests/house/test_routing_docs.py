"""What docs/routing.md lists is what the settings and the metrics are."""

import re
from pathlib import Path

from kvmesh import telemetry
from kvmesh.core.policies.policy import BUILTIN_POLICIES
from kvmesh.runtime.router_settings import RouterSettings

TEXT = (Path(__file__).parents[2] / "docs" / "routing.md").read_text()


def named_in(section: str, pattern: str) -> set[str]:
    """Return what the first column of a section's table names."""
    rows = re.findall(r"^\| (.*?) \|", TEXT.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0], re.M)
    return {name for row in rows for name in re.findall(pattern, row)}


def test_every_setting_of_the_router_is_listed() -> None:
    assert named_in("Settings", r"`(\w+)`") == set(RouterSettings.model_fields)


def test_every_policy_of_the_mesh_is_listed() -> None:
    assert set(BUILTIN_POLICIES) <= named_in("Policies", r"`(\w+)`")


def test_every_metric_that_is_listed_exists() -> None:
    exposed = set(re.findall(r"^# TYPE (\w+) ", telemetry.exposition().decode(), re.M))

    assert {name for name in named_in("Metrics", r"`(kvmesh_\w+)") if name not in exposed} == set()
