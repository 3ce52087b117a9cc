"""A mesh on one machine with every role in a process of its own, kept running by a supervisor.

Each child is `kvmesh serve ROLE` with the settings of this process, and finds the others through etcd: a real cluster,
or one that is started as a child as well.
"""

import asyncio
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import FixRequestError, Reason, TryElsewhereError
from kvmesh.core.roster import WorkerRole
from kvmesh.discovery.embedded_etcd import free_ports
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.child_etcd import ETCD, start_etcd, wait_for_etcd
from kvmesh.runtime.composition import Composition
from kvmesh.runtime.run_folder import RunFolder
from kvmesh.runtime.server import check_free
from kvmesh.runtime.settings import Settings
from kvmesh.runtime.supervisor import ChildSpec, Supervisor
from kvmesh.services.channels import CHANNEL_OPTIONS, host_port
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc

log = telemetry.logger(__name__)

_READY_S = 300.0
_ANSWER_S = 5.0
_LOOK_AGAIN_S = 0.1
_HOPELESS_STARTS = 3
"""A child that was started this often before the mesh was ready does not come up by itself."""
_ENVIRONMENT_PREFIX = "KVMESH_"
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class ProcessMesh:
    """A mesh of processes."""

    def __init__(self, settings: Settings) -> None:
        """Check what the settings name. Raises: FixRequestError(INVALID_FIELD) naming the setting and the fix."""
        if settings.discovery.store == "memory":
            raise FixRequestError(
                Reason.INVALID_FIELD,
                "memory is seen by one process alone: with --processes use --discovery etcd or etcd://HOST:PORT",
                field="discovery.store",
            )
        Composition(settings, discovery=MemoryDiscovery()).check()
        self._settings = settings
        self._has_queue = settings.remote_prefill.mode == "queue"
        self._folder = RunFolder()
        self._supervisor = Supervisor(stop_s=settings.waits.drain_s)
        self._tasks = OwnedTasks()
        self._topology = frontend_pb2.Topology()
        self._seen = asyncio.Event()
        self._grpc_port = settings.grpc.port
        self._http_port = settings.http.port
        self._channel: grpc.aio.Channel | None = None

    @property
    def http_address(self) -> str:
        """HOST:PORT of the HTTP door, once started."""
        return host_port(self._settings.http.host, self._http_port)

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC door, once started."""
        return host_port(self._settings.grpc.host, self._grpc_port)

    async def start(self) -> None:
        """Start everything; returns when the first request can be taken.

        Raises: PortTakenError, FixRequestError where there is no etcd to start, TryElsewhereError(NO_WORKERS); what was
        started until then is ended by `stop`.
        """
        await self._choose_ports()
        endpoints = self._settings.discovery.endpoints
        if endpoints:
            await wait_for_etcd(endpoints, within_s=_ANSWER_S, check=self._refuse_if_hopeless)
        else:
            endpoints = await start_etcd(
                self._supervisor, self._folder.path / ETCD, within_s=_READY_S, check=self._refuse_if_hopeless
            )
        config = self._write_settings(endpoints)
        for name, arguments in self._children():
            argv = (sys.executable, "-m", "kvmesh.cli.main", "serve", *arguments, "--config", str(config))
            self._supervisor.start(ChildSpec(name, (*argv, "--exit-with-parent"), self._environment()))
        self._channel = grpc.aio.insecure_channel(self.grpc_address, options=CHANNEL_OPTIONS)
        self._tasks.start(self._follow(self._channel), name="topology")
        await self._wait_ready()

    def topology(self) -> frontend_pb2.Topology:
        """Return the mesh as the gateway said last."""
        return self._topology

    async def stop(self) -> None:
        """End every child, the gateway first, each in bounded time; also after a start that failed. Idempotent."""
        await self._tasks.aclose()
        if self._channel is not None:
            await self._channel.close(None)
        names = [name for name in self._supervisor.children if name != ETCD]
        doors = [name for name in names if name == "gateway"]
        workers = [name for name in names if "/decode/" in name or "/prefill/" in name]
        await self._supervisor.stop(doors)
        await self._supervisor.stop(workers)
        await self._supervisor.stop(names)
        await self._supervisor.aclose()
        self._folder.remove()

    async def _choose_ports(self) -> None:
        grpc_door, http_door = self._settings.grpc, self._settings.http
        await check_free(http_door.host, http_door.port, flag="--http-port")
        await check_free(grpc_door.host, grpc_door.port, flag="--grpc-port")
        chosen = free_ports(2)
        self._http_port = http_door.port or chosen[0]
        self._grpc_port = grpc_door.port or chosen[1]

    def _write_settings(self, endpoints: tuple[str, ...]) -> Path:
        """Write what every child runs with: JSON, which is YAML too."""
        tree = self._settings.model_dump(mode="json")
        tree["mesh"]["processes"] = False
        tree["discovery"]["store"] = f"etcd://{','.join(endpoints)}"
        tree["http"]["port"], tree["grpc"]["port"] = self._http_port, self._grpc_port
        tree["log"]["format"] = "json"
        path = self._folder.path / "settings.yaml"
        path.write_text(json.dumps(tree))
        return path

    def _children(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the children, each with its arguments of `kvmesh serve`."""
        mesh = self._settings.mesh
        first = mesh.node_name(0)
        children: list[tuple[str, tuple[str, ...]]] = []
        if self._has_queue:
            children.append(("queue", ("queue", "--node", first)))
        if mesh.router == "separate":
            children.append(("router", ("router", "--node", first)))
        if mesh.processor == "separate":
            children.append(("processor", ("processor", "--node", first)))
        children.append(("gateway", ("frontend", "--node", first)))
        workers = [(WorkerRole.DECODE, index, index) for index in range(mesh.decode)]
        workers += [(WorkerRole.PREFILL, index, mesh.decode + index) for index in range(mesh.prefill)]
        for role, index, place in workers:
            node = mesh.node_name(place)
            arguments = (role.value, "--node", node, "--index", str(index))
            children.append((f"{node}/{role.value}/{index}", arguments))
        return children

    def _environment(self) -> dict[str, str]:
        """Return a child's environment: the settings are in its file; a model's threads share the cores."""
        mesh = self._settings.mesh
        threads = str(max((os.cpu_count() or 1) // (mesh.decode + mesh.prefill), 1))
        shared = dict.fromkeys(_THREADS, threads)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(_ENVIRONMENT_PREFIX)}
        return {**shared, **inherited, "PYTHONUNBUFFERED": "1"}

    async def _follow(self, channel: grpc.aio.Channel) -> None:
        """Keep the topology, over every restart of the gateway."""
        stub = frontend_pb2_grpc.FrontendStub(channel)
        request = frontend_pb2.WatchTopologyRequest()
        request.interval.FromMilliseconds(500)
        while True:
            try:
                async for response in stub.WatchTopology(request, wait_for_ready=True):
                    self._topology = response.topology
                    self._seen.set()
            except grpc.aio.AioRpcError as exc:
                log.debug("gateway.lost", error=exc.code().name)
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _wait_ready(self) -> None:
        mesh = self._settings.mesh
        try:
            async with asyncio.timeout(_READY_S):
                while len(self._topology.workers) < mesh.decode + mesh.prefill or (
                    self._has_queue and not self._topology.HasField("queue")
                ):
                    self._refuse_if_hopeless()
                    self._seen.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._seen.wait(), _LOOK_AGAIN_S)
        except TimeoutError as exc:
            raise TryElsewhereError(
                Reason.NO_WORKERS, f"the workers did not come up within {_READY_S:g} s: see the log above"
            ) from exc

    def _refuse_if_hopeless(self) -> None:
        for name, child in self._supervisor.children.items():
            if child.starts >= _HOPELESS_STARTS:
                raise TryElsewhereError(
                    Reason.NO_WORKERS, f"{name} ends as soon as it is started, with exit {child.last_exit}: see above"
                )
