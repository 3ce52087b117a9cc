"""A graph of services with every worker in a process of its own, kept running, each with its own GPUs.

Each child is `kvmesh serve module:Class --only Class`. They join the mesh whose store is named, or find each other
through an etcd that is started as a child too, beside a frontend.
"""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.discovery.discovery import Discovery
from kvmesh.discovery.embedded_etcd import free_ports
from kvmesh.runtime.child_etcd import ETCD, start_etcd, wait_for_etcd
from kvmesh.runtime.component_config import ServiceConfig
from kvmesh.runtime.composition import connect_discovery, node_name
from kvmesh.runtime.gpu_assignment import VISIBLE, assign_gpus, devices_here
from kvmesh.runtime.role import stop_all
from kvmesh.runtime.run_folder import RunFolder
from kvmesh.runtime.server import check_free
from kvmesh.runtime.settings import DiscoverySettings, Settings
from kvmesh.runtime.supervisor import ChildSpec, Supervisor
from kvmesh.sdk.runtime import Runtime
from kvmesh.services.channels import host_port

_READY_S = 120.0
"""Generous: workers load models."""
_ANSWER_S = 5.0
_LOOK_AGAIN_S = 0.1
_HOPELESS_STARTS = 3
_ENVIRONMENT_PREFIX = "KVMESH_"
_GATEWAY = "gateway"


class ComponentProcesses:
    """The processes of one graph."""

    def __init__(
        self, target: str, services: Sequence[ServiceConfig], settings: Settings, *, config_flags: Sequence[str]
    ) -> None:
        """Serve `target`; `config_flags` are the arguments of `serve` that `services` were read from.

        Raises: FixRequestError(INVALID_FIELD) where there are not as many GPUs as they ask for.
        """
        self._target = target
        self._services = services
        self._settings = settings
        self._config_flags = tuple(config_flags)
        self._is_alone = not settings.discovery.endpoints
        self._gpus = assign_gpus([(one.definition, one.workers) for one in services], devices_here(os.environ))
        self._folder = RunFolder()
        # A child's requests have this long to end, and its on_shutdown after them.
        self._supervisor = Supervisor(stop_s=2 * settings.waits.drain_s)
        self._discovery: Discovery | None = None
        self._runtime: Runtime | None = None
        self._http_port = self._grpc_port = 0

    @property
    def name(self) -> str:
        """What is served, as in logs."""
        return self._target

    @property
    def addresses(self) -> dict[str, str]:
        """Where the door is reached, once started; nothing where it is another process's."""
        if not self._is_alone:
            return {}
        http, grpc = self._settings.http, self._settings.grpc
        return {
            "http": f"http://{host_port(http.host, self._http_port)}",
            "grpc": host_port(grpc.host, self._grpc_port),
        }

    async def start(self) -> None:
        """Start every process, and return when every worker takes requests. Raises: TryElsewhereError(NO_WORKERS)."""
        endpoints = self._settings.discovery.endpoints
        if self._is_alone:
            await self._choose_ports()
            endpoints = await start_etcd(
                self._supervisor, self._folder.path / ETCD, within_s=_ANSWER_S * 6, check=self._refuse_if_hopeless
            )
        else:
            await wait_for_etcd(endpoints, within_s=_ANSWER_S, check=self._refuse_if_hopeless)
        store = f"etcd://{','.join(endpoints)}"
        config = self._write_settings(store)
        if self._is_alone:
            self._start_child(_GATEWAY, ("frontend",), config, {})
        for service in self._services:
            for index in range(service.workers):
                self._start_worker(service, index, config)
        joined = self._settings.model_copy(update={"discovery": DiscoverySettings(store=store)})
        self._discovery = connect_discovery(joined)
        self._runtime = Runtime(self._discovery, namespace=self._settings.namespace)
        self._runtime.start()
        await self._wait_workers(self._runtime)

    async def wait_ready(self) -> None:
        """Return at once: `start` waited."""

    async def stop(self) -> None:
        """End every process, the callers before the called, each in bounded time. Idempotent."""
        names = [name for name in self._supervisor.children if name not in (ETCD, _GATEWAY)]
        await stop_all(
            (
                *(one.aclose for one in (self._runtime, self._discovery) if one is not None),
                partial(self._supervisor.stop, [_GATEWAY]),
                partial(self._supervisor.stop, list(reversed(names))),
                self._supervisor.aclose,
                self._remove_folder,
            )
        )

    async def _remove_folder(self) -> None:
        self._folder.remove()

    def _start_worker(self, service: ServiceConfig, index: int, config: Path) -> None:
        definition = service.definition
        gpus = self._gpus[definition.address, index]
        arguments = (self._target, "--only", definition.cls.__name__, "--index", str(index), *self._config_flags)
        name = f"{definition.component}/{index}"
        self._start_child(name, arguments, config, {} if gpus is None else {VISIBLE: gpus})

    def _start_child(self, name: str, arguments: tuple[str, ...], config: Path, changes: dict[str, str]) -> None:
        argv = (sys.executable, "-m", "kvmesh.cli.main", "serve", *arguments, "--config", str(config))
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(_ENVIRONMENT_PREFIX)}
        environment = {**inherited, "PYTHONUNBUFFERED": "1", **changes}
        self._supervisor.start(ChildSpec(name, (*argv, "--exit-with-parent"), environment))

    def _write_settings(self, store: str) -> Path:
        """Write what every child runs with: JSON, which is YAML too."""
        tree = self._settings.model_dump(mode="json")
        tree["discovery"]["store"] = store
        tree["log"]["format"] = "json"
        tree["process"]["node"], tree["process"]["metrics_port"] = node_name(self._settings), 0
        if self._is_alone:
            tree["http"]["port"], tree["grpc"]["port"] = self._http_port, self._grpc_port
            tree["engine"] = {"name": "echo"}  # the door is for the components
        path = self._folder.path / "settings.yaml"
        path.write_text(json.dumps(tree))
        return path

    async def _choose_ports(self) -> None:
        http, grpc = self._settings.http, self._settings.grpc
        await check_free(http.host, http.port, flag="--http-port")
        await check_free(grpc.host, grpc.port, flag="--grpc-port")
        chosen = free_ports(2)
        self._http_port, self._grpc_port = http.port or chosen[0], grpc.port or chosen[1]

    async def _wait_workers(self, runtime: Runtime) -> None:
        try:
            async with asyncio.timeout(_READY_S):
                while any(self._count(runtime, one) < one.workers for one in self._services):
                    self._refuse_if_hopeless()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(runtime.changed(), _LOOK_AGAIN_S)
        except TimeoutError as exc:
            raise TryElsewhereError(
                Reason.NO_WORKERS, f"the workers did not come up within {_READY_S:g} s: see the log above"
            ) from exc

    def _count(self, runtime: Runtime, service: ServiceConfig) -> int:
        """Count the workers of this graph that are there; the mesh may have others of the same component."""
        definition = service.definition
        node = node_name(self._settings)
        mine = {f"{node}/{definition.namespace}.{definition.component}/{index}" for index in range(service.workers)}
        return sum(record.worker_id in mine for record in runtime.workers(definition.namespace, definition.component))

    def _refuse_if_hopeless(self) -> None:
        for name, child in self._supervisor.children.items():
            if child.starts >= _HOPELESS_STARTS:
                raise TryElsewhereError(
                    Reason.NO_WORKERS, f"{name} ends as soon as it is started, with exit {child.last_exit}: see above"
                )
