"""What is under deploy/, and what its command lines and environments mean to the program itself."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from kvmesh.cli import serve
from kvmesh.cli.main import app, main
from kvmesh.runtime.settings import Settings

Manifest = dict[str, Any]

_MERGE_KEYS = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath", "ports": "name"}
"""Lists of a Deployment that a strategic merge patch merges item by item; the others it replaces."""


class Serving(NamedTuple):
    """What `kvmesh serve ...` would serve."""

    role: str
    settings: Settings


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[3]


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str], Mapping[str, str]], Serving]:
    """Read the arguments and the environment of a `kvmesh serve` as it does, up to where it would begin to serve.

    Raises: ValueError when the command refuses them; what it says is on stderr.
    """
    found: list[Serving] = []
    monkeypatch.setattr(
        serve, "_serve", lambda role, loaded, *, exit_with_parent: found.append(Serving(role, loaded.settings))
    )

    def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Serving:
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("KVMESH_")]:
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                main(list(arguments))
        if end.value.code != 0 or not found:
            raise ValueError(f"kvmesh {' '.join(arguments)}: exit code {end.value.code}")
        return found.pop()

    return read


@pytest.fixture
def parsed() -> Callable[[Sequence[str]], dict[str, Any]]:
    """Parse the arguments of a one-word command of `kvmesh` and do nothing. Raises: typer.TyperException."""

    def parse(arguments: Sequence[str]) -> dict[str, Any]:
        commands: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group
        name, *rest = arguments
        return dict(commands[name].make_context(name, list(rest)).params)

    return parse


@pytest.fixture(scope="session")
def kustomized() -> Callable[[Path], list[Manifest]]:
    """Build a kustomization, as far as ours go. Raises: ValueError for a file not listed, or listed in vain."""
    return _kustomize


def _kustomize(folder: Path) -> list[Manifest]:
    top = yaml.safe_load((folder / "kustomization.yaml").read_text())
    apart = set(top) - {"apiVersion", "kind", "resources", "patches", "configMapGenerator", "images", "replicas"}
    if apart:
        raise ValueError(f"{folder}: this builder does not know {sorted(apart)}")
    generated = {name: item["files"] for item in top.get("configMapGenerator", ()) for name in [item["name"]]}
    patches = top.get("patches", ())
    listed = {"kustomization.yaml", *(patch["path"] for patch in patches if "path" in patch)}
    listed |= {*top["resources"], *(file for files in generated.values() for file in files)}
    if wrong := {path.name for path in folder.iterdir()} ^ {name for name in listed if "/" not in name}:
        raise ValueError(f"{folder}: not both there and listed: {sorted(wrong)}")

    manifests: list[Manifest] = []
    for name in top["resources"]:
        path = folder / name
        manifests += _kustomize(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for name, files in generated.items():
        data = {file: (folder / file).read_text() for file in files}
        manifests.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
    for patch in patches:
        text = (folder / patch["path"]).read_text() if "path" in patch else patch["patch"]
        content = {key: value for key, value in yaml.safe_load(text).items() if key != "metadata"}
        manifests = [_merge(each, content) if _matches(each, patch["target"]) else each for each in manifests]
    for replicas in top.get("replicas", ()):
        _only(manifests, "Deployment", replicas["name"])["spec"]["replicas"] = replicas["count"]
    for image in top.get("images", ()):
        for container in (one for each in manifests for one in pod_of(each).get("containers", ())):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return manifests


def pod_of(manifest: Manifest) -> Manifest:
    """Return the pod that a manifest makes, or nothing."""
    pod: Manifest = manifest.get("spec", {}).get("template", {}).get("spec", {})
    return pod


def _matches(manifest: Manifest, target: Manifest) -> bool:
    return all(manifest[key] == value for key, value in target.items())


def _only(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def _merge(base: Any, patch: Any, key: str = "") -> Any:
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {name: _merge(base.get(name), value, name) for name, value in patch.items()}
    if isinstance(base, list) and key in _MERGE_KEYS:
        by = _MERGE_KEYS[key]
        items = {item[by]: item for item in base}
        return list((items | {item[by]: _merge(items.get(item[by]), item) for item in patch}).values())
    return patch
