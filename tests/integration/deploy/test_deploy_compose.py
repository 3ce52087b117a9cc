"""The compose files: the part of the compose specification that they use, and what kvmesh makes of their services."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytest
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvmesh.cli.main import main
from kvmesh.core.waits import Waits
from kvmesh.runtime.engine_registry import plan_engine
from kvmesh.runtime.served_role import ROLES
from kvmesh.runtime.server import CLEANUP_S, FLUSH_S
from kvmesh.runtime.settings import Settings

Serving = Callable[[Sequence[str], Mapping[str, str]], Any]
Parsed = Callable[[Sequence[str]], dict[str, Any]]

STOP_S = Waits().drain_s + CLEANUP_S + FLUSH_S
DOORS = {8000, 50051}
Duration = Annotated[str, Field(pattern=r"^\d+s$")]
Port = Annotated[str, Field(pattern=r"^127\.0\.0\.1:\d+:\d+$")]
"""Published on loopback alone: there is no TLS."""


class Part(BaseModel):
    """A part of a compose file, as the compose specification has it: unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Healthcheck(Part):
    test: Annotated[list[str], Field(min_length=2)]
    start_period: Duration
    start_interval: Duration
    interval: Duration
    timeout: Duration
    retries: int


class Dependency(Part):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class BindOptions(Part):
    create_host_path: bool


class Bind(Part):
    type: Literal["bind"]
    source: str
    target: str
    read_only: bool
    bind: BindOptions


class Service(Part):
    image: str = Field(pattern=r"^[a-z0-9./-]+:v?\d+\.\d+\.\d+$")
    """Of one release: a tag that moves brings what nobody tested."""
    command: list[str]
    hostname: str | None = None
    restart: Literal["unless-stopped"]
    stop_grace_period: Duration = "10s"
    read_only: bool = False
    tmpfs: list[str] = []
    cap_drop: list[str] = []
    security_opt: list[str] = []
    environment: dict[str, str] = {}
    healthcheck: Healthcheck
    depends_on: dict[str, Dependency] = {}
    ports: list[Port] = []
    volumes: list[Bind] = []


class Composed(Part):
    name: str
    services: dict[str, Service]


def composed(folder: Path, *names: str, variables: Mapping[str, str] | None = None) -> Composed:
    """Read compose files, each over the one before. Raises: ValidationError, or KeyError for a variable not set."""
    given = variables or {}

    def value(found: re.Match[str]) -> str:
        name, kind, text = found.groups()
        return given[name] if name in given or kind == "?" else text

    merged: dict[str, Any] = {}
    for name in names:
        text = re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, (folder / name).read_text())
        tree = {key: part for key, part in yaml.safe_load(text).items() if not key.startswith("x-")}
        merged = over(merged, tree)
    return Composed(**merged)


def over(base: Any, top: Any) -> Any:
    """Merge as compose does: maps key by key; the lists of our second file are nowhere in the first."""
    if isinstance(base, dict) and isinstance(top, dict):
        return base | {key: over(base.get(key), value) for key, value in top.items()}
    assert not (isinstance(base, list) and isinstance(top, list))
    return top


def faults(compose: Composed, serving: Serving, parsed: Parsed) -> Iterator[str]:
    """Yield where services are at odds with each other, or with what kvmesh makes of them."""
    for name, service in compose.services.items():
        yield from (f"{name} waits for {other}" for other in service.depends_on if other not in compose.services)
        if (name == "frontend") != bool(service.ports):
            yield f"{name} publishes {service.ports}"
    roles = {name: service for name, service in compose.services.items() if name != "etcd"}
    stores = set()
    for name, service in roles.items():
        settings = {key: value for key, value in service.environment.items() if key.startswith("KVMESH_")}
        try:
            role, found = serving(service.command, settings)
            probe = parsed(service.healthcheck.test[2:])
        except (ValueError, typer.TyperException) as error:
            yield f"{name}: {error}"
            continue
        stores.add(found.discovery.store)
        yield from role_faults(name, service, role, found)
        port = found.grpc.port if role == "frontend" else found.process.port
        if service.healthcheck.test[:3] != ["CMD", "kvmesh", "probe"] or probe["address"] != f"127.0.0.1:{port}":
            yield f"{name}: its health is not asked for at its port {port}"
    if {name.partition("-")[0] for name in roles} != set(ROLES):
        yield f"the roles are {sorted(roles)}"
    if stores != {"etcd://etcd:2379"}:
        yield f"the roles meet at {stores}"


def role_faults(name: str, service: Service, role: str, settings: Settings) -> Iterator[str]:
    if role != name.partition("-")[0]:
        yield f"{name} serves {role}"
    if service.hostname != name:  # the node in its id; unique as services are
        yield f"{name} calls itself {service.hostname}"
    if role != "frontend" and settings.process.advertise != name:
        yield f"{name} is not reached at {settings.process.advertise!r}"
    if role == "frontend" and {int(port.rpartition(":")[2]) for port in service.ports} != DOORS:
        yield f"{name} publishes {service.ports}"
    if (settings.grpc.port, settings.http.port) != (50051, 8000):
        yield f"{name} has its doors elsewhere"
    if {settings.grpc.host, settings.http.host, settings.process.host} != {"0.0.0.0"}:
        yield f"{name} is not reached by other containers"
    if not float(service.stop_grace_period.removesuffix("s")) > STOP_S:
        yield f"{name} is killed before it is drained"
    mounted = {bind.target for bind in service.volumes}
    if settings.engine.model is not None and str(settings.engine.model) not in mounted:
        yield f"{name} has no model at {settings.engine.model}"


def test_the_services_have_no_fault(root: Path, serving: Serving, parsed: Parsed) -> None:
    compose = composed(root / "deploy", "compose.yaml")

    assert list(faults(compose, serving, parsed)) == []
    for service in compose.services.values():
        if "kvmesh" in service.image:
            plan_engine(serving(service.command, service.environment).settings.engine)


def test_with_the_second_file_every_role_has_the_model(
    root: Path, serving: Serving, parsed: Parsed, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["model", "make-tiny", str(tmp_path / "tiny")])

    compose = composed(
        root / "deploy", "compose.yaml", "compose.numpy-llama.yaml", variables={"MODEL": str(tmp_path / "tiny")}
    )

    assert list(faults(compose, serving, parsed)) == []
    for name in set(compose.services) - {"etcd"}:
        service = compose.services[name]
        settings = {key: value for key, value in service.environment.items() if key.startswith("KVMESH_")}
        engine = serving(service.command, settings).settings.engine
        assert [bind.source for bind in service.volumes] == [str(tmp_path / "tiny")]
        assert plan_engine(engine.model_copy(update={"model": tmp_path / "tiny"})).model_name == "llama"


def test_the_second_file_wants_a_model(root: Path) -> None:
    with pytest.raises(KeyError, match="MODEL"):
        composed(root / "deploy", "compose.yaml", "compose.numpy-llama.yaml")


class Break(NamedTuple):
    old: str
    new: str
    told: str


BROKEN = [
    Break("stop_grace_period: 45s", "stop_grace: 45s", "stop_grace"),
    Break("stop_grace_period: 45s", "stop_grace_period: 30s", "killed before it is drained"),
    Break("condition: service_healthy", "condition: healthy", "condition"),
    Break("router: {condition", "gateway: {condition", "waits for gateway"),
    Break("v3.5.21", "latest", "image"),
    Break("127.0.0.1:${HTTP_PORT:-8000}", "${HTTP_PORT:-8000}", "ports"),
    Break("127.0.0.1:${HTTP_PORT:-8000}:8000", "127.0.0.1:${HTTP_PORT:-8000}:9090", "publishes"),
    Break("serve, decode,", "serve, decoder,", "decode-1: kvmesh serve decoder"),
    Break("serve, decode,", "serve, prefill,", "decode-1 serves prefill"),
    Break("--advertise, decode-2", "--advertise, decode-1", "decode-2 is not reached at 'decode-1'"),
    Break("--advertise, decode-2", "--advertize, decode-2", "decode-2: kvmesh serve"),
    Break("hostname: decode-2", "hostname: decode-1", "decode-2 calls itself decode-1"),
    Break("serve, queue, --advertise, queue, --insecure", "serve, queue, --advertise, queue", "queue: kvmesh serve"),
    Break("KVMESH_ENGINE__NAME", "KVMESH_ENGINE_NAME", "exit code 2"),
    Break('KVMESH_PROCESS__PORT: "50051"', 'KVMESH_PROCESS__PORT: "50052"', "not asked for at its port 50052"),
    Break("KVMESH_PROCESS__HOST: 0.0.0.0", "KVMESH_PROCESS__HOST: 127.0.0.1", "not reached by other containers"),
    Break("probe, ", "probe, --servce, x, ", "--servce"),
    Break("etcd://etcd:2379", "etcd://store:2379", "meet at"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=[each.new for each in BROKEN])
def test_a_broken_copy_is_told(broken: Break, root: Path, serving: Serving, parsed: Parsed, tmp_path: Path) -> None:
    shutil.copy(root / "deploy/compose.yaml", tmp_path)
    text = (tmp_path / "compose.yaml").read_text()
    assert broken.old in text
    (tmp_path / "compose.yaml").write_text(text.replace(broken.old, broken.new))

    try:
        found = list(faults(composed(tmp_path, "compose.yaml"), serving, parsed))
    except ValidationError as error:
        found = [str(error)]

    assert any(broken.told in fault for fault in found), found
