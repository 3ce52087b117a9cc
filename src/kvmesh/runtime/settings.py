"""The one settings tree, and `load_settings`, which fills it: defaults < file < `KVMESH_*` env < flags.

`Settings(...)` itself reads nothing but its arguments, so that a test or an embedding program gets what it wrote.
Every key is two levels deep (`section.name`), except `insecure` and the entries of `engine.options`
and `router.policy_options`.
"""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from kvmesh.core.waits import Waits
from kvmesh.runtime.router_settings import RouterSettings
from kvmesh.runtime.settings_section import Port, Section, scalars_as_text
from kvmesh.runtime.settings_sources import LoadedSettings, SettingsError, load_tree

__all__ = ["LoadedSettings", "RouterSettings", "Settings", "SettingsError", "load_settings"]


class MeshSettings(Section):
    """How many workers one process runs, and what their nodes are called."""

    decode: int = Field(default=2, ge=1, le=64)
    """Decode workers."""
    prefill: int = Field(default=1, ge=0, le=64)
    """Prefill workers; 0 = aggregated, every prefill is local."""
    router: Literal["inside", "separate"] = "inside"
    """Where the router runs: inside the processor's process, or in a process of its own."""
    processor: Literal["inside", "separate"] = "inside"
    """Where the processor runs: inside the frontend's process, or in a process of its own."""
    processes: bool = False
    """True: `up` runs every role in a process of its own, and brings back those that die."""
    local_streams: bool = True
    """Roles of one process hand the streams between them over in memory; False = over gRPC, as between processes."""
    node_names: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Names that the workers take round robin, decode workers first; empty = NODE1, NODE2, ..., one per worker."""

    node_labels: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Labels of the workers of a node, for routing: `NODE:KEY=VALUE`, one by one."""

    @field_validator("node_names", "node_labels", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("node_names")
    @classmethod
    def _refuse_unusable_names(cls, names: list[str]) -> list[str]:
        for name in names:
            if not name or "/" in name or not name.isprintable():
                raise ValueError(f"{name!r} cannot name a node: one or more printable characters, and no '/'")
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is given twice: --node-names are taken round robin, so once is enough")
        return names

    @field_validator("node_labels")
    @classmethod
    def _refuse_malformed_labels(cls, labels: list[str]) -> list[str]:
        for label in labels:
            node, _, pair = label.partition(":")
            if not node or "=" not in pair.lstrip("="):
                raise ValueError(f"{label!r} is not NODE:KEY=VALUE, e.g. NODE1:zone=a")
        return labels

    def labels_of(self, node: str) -> dict[str, str]:
        """Return the labels of the workers of a node."""
        pairs = [label.partition(":")[2] for label in self.node_labels if label.partition(":")[0] == node]
        return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}

    def nodes(self) -> list[str]:
        """Return the nodes that have workers, in order."""
        return list(dict.fromkeys(self.node_name(index) for index in range(self.decode + self.prefill)))

    def node_name(self, worker_index: int) -> str:
        """Return the node of the worker with this index from 0: decode workers come first, then prefill workers."""
        return self.node_names[worker_index % len(self.node_names)] if self.node_names else f"NODE{worker_index + 1}"


class EngineSettings(Section):
    """What runs inside each worker."""

    name: str = Field(default="numpy_llama", min_length=1)
    """Name of the engine, as the composition root registers it, e.g. "echo" or "simulated"."""
    options: dict[str, str] = Field(default_factory=dict)
    """The engine's own options; it checks them itself."""
    speedup: float | None = Field(default=None, ge=0, le=1_000_000)
    """Divides the modelled time of a simulated engine; 0 = as fast as it can; None = the engine's default."""
    model: Path | None = None
    """Folder of the model or tokenizer; None = the small model that kvmesh brings for numpy_llama, else none."""
    model_name: str | None = Field(default=None, min_length=1)
    """Name under which the model is served; None = the engine's default."""

    @field_validator("options", mode="before")
    @classmethod
    def _write_scalars_as_text(cls, value: object) -> object:
        return scalars_as_text(value)


class QueueSettings(Section):
    """The prefill queue's leases and bounds."""

    lease_ttl_s: float = Field(default=10.0, gt=0, le=3_600)
    """Life of a lease that is not extended."""
    max_attempts: int = Field(default=3, ge=1, le=100)
    """Leases of one task, however they end; then it is dead."""
    max_depth: int = Field(default=1_024, ge=1, le=1_000_000)
    """Waiting tasks beyond which Submit is refused."""
    max_skips: int = Field(default=4, ge=0, le=1_000)
    """Times a task may be passed over for a younger one with a cached prefix; 0 = no affinity."""
    backoff_base_s: float = Field(default=2.0, ge=0, le=3_600)
    """Wait after the first failed attempt; each further one doubles it."""
    backoff_cap_s: float = Field(default=30.0, ge=0, le=3_600)
    """Longest wait after a failed attempt."""


class RemotePrefillSettings(Section):
    """When a decode worker asks a prefill worker."""

    min_uncached_tokens: int | None = Field(default=None, ge=0, le=100_000_000)
    """Remote from this many uncached prompt tokens on; 0 = never; None = 1 for echo and tiny models, else 256."""
    min_prompt_tokens: int | None = Field(default=None, ge=0, le=100_000_000)
    """Prompts of fewer tokens stay local whatever is cached; None = no minimum."""
    max_queue_depth: int = Field(default=512, ge=0, le=1_000_000)
    """Local while more tasks than this are queued."""
    required: bool = False
    """True: a failed remote prefill fails the request (PREFILL_FAILED) instead of running locally."""
    mode: Literal["queue", "direct"] = "queue"
    """queue = prefill workers pull tasks from the prefill queue; direct = decode workers choose one and ask it."""
    max_direct_tasks: int = Field(default=32, ge=1, le=10_000)
    """Tasks that a prefill worker runs for those who ask it directly; it refuses more, and another one is asked."""
    checksums: bool = False
    """True: lent blocks carry checksums, and what arrives with another one is dropped and computed locally."""


class OutputSettings(Section):
    """How output travels from the workers to the clients."""

    merge_s: float = Field(default=0.075, ge=0, le=1)
    """How long a worker with 48 requests or more of one processor may hold output of a request that streams already,
    so that several steps share a frame and a socket write; each token stays an event. With fewer requests it is as much
    less, down to a third with 16, and below eight nothing waits. 0 = never."""


class HttpSettings(Section):
    """The HTTP door."""

    host: str = "127.0.0.1"
    """Address to bind."""
    port: Port = 8000
    """Port to bind; 0 = any free one."""
    max_body_bytes: int = Field(default=8 * 1024 * 1024, ge=1_024, le=1024 * 1024 * 1024)
    """Longest request body; a longer one is answered with 413."""


class GrpcSettings(Section):
    """The gRPC door."""

    host: str = "127.0.0.1"
    """Address to bind."""
    port: Port = 50_051
    """Port to bind; 0 = any free one."""
    max_request_bytes: int = Field(default=8 * 1024 * 1024, ge=1_024, le=64 * 1024 * 1024)
    """Longest request message; gRPC itself refuses a longer one: RESOURCE_EXHAUSTED."""


class DiscoverySettings(Section):
    """Where the processes of a mesh find each other."""

    store: str = "auto"
    """memory = within one process; etcd = a child process of `up`; etcd://HOST:PORT[,HOST:PORT] = a cluster;
    auto = memory, or etcd where `up` runs processes."""
    ttl_s: int = Field(default=10, ge=2, le=600)
    """How long a record outlives the last sign of life of its process."""

    @field_validator("store")
    @classmethod
    def _refuse_unknown_stores(cls, store: str) -> str:
        if store in ("auto", "memory", "etcd"):
            return store
        scheme, _, rest = store.partition("://")
        if scheme != "etcd" or not all(_is_endpoint(endpoint) for endpoint in rest.split(",")):
            raise ValueError(f"{store!r} is none of auto, memory, etcd, etcd://HOST:PORT[,HOST:PORT]")
        return store

    @property
    def endpoints(self) -> tuple[str, ...]:
        """HOST:PORT of each member of a cluster; empty for the other stores."""
        return tuple(self.store.removeprefix("etcd://").split(",")) if "://" in self.store else ()


class ProcessSettings(Section):
    """One process of `serve`: what only it is, and where others reach it."""

    host: str = "127.0.0.1"
    """Address to bind, for every role but the frontend, whose doors are `http.*` and `grpc.*`."""
    port: Port = 0
    """gRPC port to bind; 0 = any free one."""
    advertise: str = ""
    """Host by which others reach this process; "" = the one it binds, or the host's name where it binds all."""
    advertise_port: Port = 0
    """Port by which others reach this process; 0 = the one it binds."""
    node: str = ""
    """The node's name in the ids of what runs here; "" = the host's name."""
    index: int = Field(default=0, ge=0, le=1_000_000)
    """Number among those of the same role on the same node."""
    transports: Annotated[
        tuple[Literal["memory", "nixl", "shared_memory", "tcp"], ...], NoDecode, Field(min_length=1)
    ] = (
        "nixl",
        "shared_memory",
        "tcp",
    )
    """By what workers move KV, best first; what this host cannot run is left out. `nixl` beside `shared_memory` takes
    its place, because their pools differ; `memory` is for workers of one process, and nothing to others."""
    metrics_port: Port = 0
    """Port of /metrics, for every role but the frontend, which has it at its HTTP door; 0 = any free one."""

    @field_validator("transports", mode="before")
    @classmethod
    def _split_transports_at_commas(cls, value: object) -> object:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("node")
    @classmethod
    def _refuse_unusable_node(cls, node: str) -> str:
        if "/" in node or not (node == "" or node.isprintable()):
            raise ValueError(f"{node!r} cannot name a node: printable characters, and no '/'")
        return node


class LogSettings(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    """Events below this level are dropped."""
    format: Literal["auto", "json", "console"] = "auto"
    """auto = console on a terminal, else json."""


class Settings(BaseSettings):
    """Every setting of a kvmesh process."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix="KVMESH_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    namespace: str = Field(default="default", min_length=1)
    """Workers find each other within one namespace."""
    mesh: MeshSettings = MeshSettings()
    engine: EngineSettings = EngineSettings()
    router: RouterSettings = RouterSettings()
    queue: QueueSettings = QueueSettings()
    remote_prefill: RemotePrefillSettings = RemotePrefillSettings()
    waits: Waits = Waits()
    output: OutputSettings = OutputSettings()
    http: HttpSettings = HttpSettings()
    grpc: GrpcSettings = GrpcSettings()
    discovery: DiscoverySettings = DiscoverySettings()
    process: ProcessSettings = ProcessSettings()
    log: LogSettings = LogSettings()
    insecure: bool = False
    """True: hosts other than loopback may be bound without TLS."""

    @model_validator(mode="after")
    def _refuse_to_leave_loopback(self) -> "Settings":
        doors = (("http.host", self.http.host), ("grpc.host", self.grpc.host), ("process.host", self.process.host))
        for key, host in doors:
            if not self.insecure and not is_loopback(host):
                raise ValueError(
                    f"{key} = {host!r} leaves loopback, where anyone could use the mesh: "
                    "pass --insecure (insecure = true) if the network is trusted, or keep 127.0.0.1"
                )
        return self

    @model_validator(mode="after")
    def _refuse_doors_on_one_port(self) -> "Settings":
        http, grpc = self.http, self.grpc
        wildcards = {"0.0.0.0", "::"}
        if http.port == grpc.port != 0 and (http.host == grpc.host or wildcards & {http.host, grpc.host}):
            raise ValueError(f"http.port = grpc.port = {http.port}: the two doors need a port each")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing but the arguments: file and environment are `load_settings`'s."""
        return (init_settings,)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach what is bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return host != "" and port.isdecimal() and 0 < int(port) < 65_536  # a port


def load_settings(
    *, config_file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> LoadedSettings[Settings]:
    """Return the settings in force and where each comes from; `overrides` are flags by dotted key.

    Raises: SettingsError whose text names every wrong setting, its source and the fix.
    """
    return load_tree(Settings, config_file=config_file, overrides=overrides or {})
