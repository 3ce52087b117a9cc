"""What the documents say of several machines is what there is."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvmesh import telemetry
from kvmesh.runtime.settings import load_settings

Serving = Callable[[Sequence[str], Mapping[str, str]], Any]


@pytest.fixture
def operations(root: Path) -> str:
    return (root / "docs/operations.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "docs/operations.md"])
def test_every_serve_command_of_a_document_is_one(document: str, root: Path, serving: Serving) -> None:
    lines = re.findall(r"^(?:\.venv/bin/)?kvmesh (serve .*)$", (root / document).read_text(), re.M)

    roles = [serving(shlex.split(line), {}).role for line in lines]

    assert roles == [line.split()[1] for line in lines] != []


def test_every_file_that_the_documents_name_is_there(root: Path) -> None:
    readme = (root / "README.md").read_text()
    section = readme[readme.index("## Several machines") :].partition("\n## ")[0]
    named = set(re.findall(r"\b(?:deploy|docs)/[\w./-]+", section))
    linked = re.findall(r"\]\((.+?)\)", (root / "docs/operations.md").read_text())

    assert len(named) > 3
    assert [name for name in named if not (root / name).exists()] == []
    assert [name for name in linked if not (root / "docs" / name).exists()] == []


def test_operations_names_the_health_services_of_the_manifests(root: Path, operations: str) -> None:
    manifests = [text for path in (root / "deploy/kubernetes/base").glob("*.yaml") for text in [path.read_text()]]
    probed = set(re.findall(r"service: (kvmesh\.v1\.\w+)", "".join(manifests)))

    assert set(re.findall(r"`(kvmesh\.v1\.\w+)`", operations)) == probed


def test_operations_names_settings_that_there_are(operations: str) -> None:
    origins = load_settings().origins
    sections = "|".join({key.partition(".")[0] for key in origins if "." in key})

    named = set(re.findall(rf"`((?:{sections})\.\w+)`", operations))

    assert len(named) > 8
    assert named - set(origins) == set()


def test_operations_names_metrics_that_there_are(operations: str) -> None:
    exposed = telemetry.exposition().decode()

    named = set(re.findall(r"`(kvmesh_\w+[a-z])[`{]", operations))

    assert len(named) > 4
    assert [name for name in named if f"# TYPE {name} " not in exposed] == []


def test_operations_states_the_graces_of_the_manifests(root: Path, operations: str) -> None:
    compose = (root / "deploy/compose.yaml").read_text()
    pod = yaml.safe_load((root / "deploy/kubernetes/base/every-role.yaml").read_text())["spec"]["template"]["spec"]

    assert re.findall(r"`(stop_grace_period: .+?)`", operations) == re.findall(r"(stop_grace_period: .+)", compose)
    assert f"`terminationGracePeriodSeconds: {pod['terminationGracePeriodSeconds']}`" in operations
