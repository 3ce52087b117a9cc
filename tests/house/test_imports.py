"""Imports point one way, and core is pure."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "kvmesh"

# What a package may import of ours, besides itself and the generated contract.
ALLOWED = {
    "core": set(),
    "telemetry": set(),
    "wire": {"core"},
    "engines": {"core"},
    "transports": {"core"},
    "discovery": {"core", "telemetry"},
    "tokenizing": {"core"},
    "services": {
        "core", "wire", "telemetry", "tokenizing",
        "engines.engine", "transports.transport", "discovery.discovery",
    },
    "gateway": {"core", "wire", "telemetry", "services.channels", "services.owned_tasks", "services.stalled_clients"},
    # A program that only calls components has no composition root: it reads discovery through the mesh's door.
    "sdk": {"core", "wire", "telemetry", "services", "engines.engine", "discovery.discovery", "discovery.door"},
    "runtime": {
        "core", "wire", "telemetry", "tokenizing", "services", "gateway", "sdk",
        "engines.engine", "transports.transport", "discovery.discovery",
    },
    "models": set(),
    "replay": {"core", "wire", "services.channels"},
    "simulate": {"core", "replay.trace"},
    "cli": {"testing.tiny_model", "core", "wire", "telemetry", "services", "runtime", "replay", "sdk", "simulate"},
    "testing": {
        "core", "wire", "telemetry", "tokenizing", "services", "runtime", "engines", "transports", "discovery", "sdk",
    },
}  # fmt: skip
# The composition root alone names implementations; the mesh in one process chooses what its roles share.
COMPOSITION_ROOT = {
    "runtime.child_etcd", "runtime.component_graph", "runtime.component_processes", "runtime.composition",
    "runtime.engine_registry", "runtime.mesh", "runtime.process_mesh", "runtime.transport_registry",
}  # fmt: skip
IMPURE = {
    "asyncio", "concurrent", "grpc", "google", "http", "logging", "os", "pathlib", "secrets", "socket", "structlog",
    "subprocess", "sys", "threading", "time", "datetime", "uuid", "prometheus_client",
}  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("module", "path"), [pytest.param(*item, id=item[0] or "kvmesh") for item in modules()])
def test_a_module_imports_only_what_its_layer_may(module: str, path: Path) -> None:
    package = module.split(".", maxsplit=1)[0]
    allowed = ALLOWED[package]

    wrong = []
    for name in imported(path):
        target = name.removeprefix("kvmesh.")
        if not name.startswith("kvmesh.") or target.split(".")[0] in (package, "v1", "etcd"):
            continue
        is_allowed = any(
            target == rule or target.startswith(f"{rule}.") or rule.startswith(f"{target}.") for rule in allowed
        )
        if not is_allowed and module not in COMPOSITION_ROOT:
            wrong.append(name)

    assert wrong == []


@pytest.mark.parametrize(
    ("module", "path"), [pytest.param(*item, id=item[0]) for item in modules() if item[0].startswith("core")]
)
def test_core_knows_no_clock_no_io_and_no_randomness_of_its_own(module: str, path: Path) -> None:
    tree = ast.parse(path.read_text())

    impure = sorted({name.split(".")[0] for name in imported(path)} & IMPURE)
    rolled = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "random"
        and node.attr != "Random"
    ]

    assert impure == []
    assert rolled == []
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef | ast.Await)]


def test_every_package_has_its_rule() -> None:
    packages = {module.split(".")[0] for module, _ in modules()}

    assert packages == set(ALLOWED)
