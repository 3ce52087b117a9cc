"""A mesh to be disturbed: every role a process behind a proxy of its own, brought back when it dies.

Two decode and two prefill workers, two queues, a gateway and an etcd, with a tiny real model whose answers can be
compared token by token. Waits are short, so that what goes wrong shows in seconds.
"""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvmesh.core.roster import WorkerRole
from kvmesh.discovery.embedded_etcd import free_ports
from kvmesh.runtime.served_role import FRONTEND
from kvmesh.runtime.supervisor import ChildSpec, Supervisor
from kvmesh.services.channels import CHANNEL_OPTIONS
from kvmesh.testing.etcd_server import EtcdServer
from kvmesh.testing.tcp_proxy import TcpProxy
from kvmesh.v1 import (
    frontend_pb2,
    frontend_pb2_grpc,
    prefill_queue_pb2,
    prefill_queue_pb2_grpc,
    worker_control_pb2,
    worker_control_pb2_grpc,
)

GATEWAY = FRONTEND
ETCD = "etcd"
ENGINE_OPTIONS = {"dtype": "float64", "block_size": "16", "total_blocks": "320"}
"""A pool that holds a part of the prompts, so that blocks are evicted as well."""
READY_S = 90.0
_STOP_S = 10.0
_STEADY_S = 2.0
_ANSWER_S = 5.0
_LOOK_AGAIN_S = 0.1
_NODE = "chaos"
_CONFIG = """
[discovery]
ttl_s = 3
[remote_prefill]
min_uncached_tokens = 32
checksums = true
mode = "{mode}"
[queue]
lease_ttl_s = 2
backoff_base_s = 0.1
[router]
reservation_ttl_s = 10
[waits]
prefill_s = 3
pin_s = 15
first_token_s = 10
token_gap_s = 6
drain_s = 5
[log]
level = "{log_level}"
"""


@dataclass(frozen=True, slots=True)
class ChaosRole:
    """One process of the mesh."""

    name: str
    role: str
    index: int
    transports: str
    """Both decode workers have all; the prefill workers differ, so that blocks move by each."""


def roles_of(*, mode: str) -> tuple[ChaosRole, ...]:
    """Return the processes: without queues in the direct mode."""
    every = "shared_memory,tcp"
    workers = (
        ChaosRole("decode-0", WorkerRole.DECODE.value, 0, every),
        ChaosRole("decode-1", WorkerRole.DECODE.value, 1, every),
        ChaosRole("prefill-0", WorkerRole.PREFILL.value, 0, every),
        ChaosRole("prefill-1", WorkerRole.PREFILL.value, 1, "tcp"),
    )
    queues = tuple(ChaosRole(f"queue-{index}", WorkerRole.QUEUE.value, index, every) for index in (0, 1))
    return (*(queues if mode == "queue" else ()), *workers, ChaosRole(GATEWAY, FRONTEND, 0, every))


class ChaosMesh:
    """Runs from `start` to `stop`."""

    def __init__(self, *, model: Path, folder: Path, mode: str, log_level: str) -> None:
        """Serve the tiny model in `model`; `mode` is the setting `remote_prefill.mode`."""
        self.etcd = EtcdServer()
        self.roles = roles_of(mode=mode)
        self.proxies: dict[str, TcpProxy] = {}
        """By the name of the role behind it."""
        self._model = model
        self._config = folder / "chaos.toml"
        self._config.write_text(_CONFIG.format(mode=mode, log_level=log_level))
        self._supervisor = Supervisor(stop_s=_STOP_S, steady_s=_STEADY_S)
        self._channels: dict[str, grpc.aio.Channel] = {}

    @property
    def channel(self) -> grpc.aio.Channel:
        """A client's channel to the gateway."""
        return self._channels[GATEWAY]

    def pid(self, name: str) -> int | None:
        """Return the process that runs a role now."""
        return self._supervisor.children[name].pid

    @property
    def starts(self) -> Mapping[str, int]:
        """How often each role was started."""
        return {name: child.starts for name, child in self._supervisor.children.items()}

    async def start(self) -> None:
        """Start everything; returns once the gateway knows every worker. Raises: TimeoutError."""
        await asyncio.to_thread(self.etcd.start)
        ports = free_ports(len(self.roles))
        for role, port in zip(self.roles, ports, strict=True):
            proxy = self.proxies[role.name] = TcpProxy(port)
            await proxy.start()
            self._channels[role.name] = grpc.aio.insecure_channel(proxy.address, options=CHANNEL_OPTIONS)
            self._supervisor.start(ChildSpec(role.name, self._command(role, port), self._environment(role, proxy.port)))
        await self.wait_ready()

    async def wait_ready(self) -> None:
        """Wait until every process answers and the gateway knows every worker. Raises: TimeoutError."""
        workers = sum(role.role in (WorkerRole.DECODE.value, WorkerRole.PREFILL.value) for role in self.roles)
        async with asyncio.timeout(READY_S):
            while True:
                try:
                    held = await self.held()
                    if len(held["workers"]) == workers:
                        return
                except (grpc.aio.AioRpcError, OSError):
                    pass
                await asyncio.sleep(_LOOK_AGAIN_S)

    async def held(self) -> dict[str, dict[str, int]]:
        """Ask every process what it holds for requests, by kind and holder; all are 0 when nothing runs.

        "workers" lists those that the gateway takes for ready. Raises: grpc.aio.AioRpcError when a process is away.
        """
        topology = await self._topology()
        found: dict[str, dict[str, int]] = {
            "workers": {w.id: 0 for w in topology.workers if w.state == frontend_pb2.WORKER_STATE_READY},
            GATEWAY: {"reservations": topology.counters.reservations, "running": topology.counters.running},
        }
        for role in self.roles:
            if role.role != FRONTEND:
                found[role.name] = await self._held_by(role)
        return found

    async def answers(self, name: str) -> bool:
        """Tell whether a process answers now."""
        (role,) = (role for role in self.roles if role.name == name)
        try:
            await (self._topology() if role.role == FRONTEND else self._held_by(role))
        except grpc.aio.AioRpcError:
            return False
        return True

    async def stop(self) -> None:
        """End everything, in bounded time; also after a start that failed."""
        try:
            for channel in self._channels.values():
                await channel.close(None)
            for proxy in self.proxies.values():
                await proxy.aclose()
            await self._supervisor.aclose()
        finally:
            await asyncio.to_thread(self.etcd.close)

    async def _held_by(self, role: ChaosRole) -> dict[str, int]:
        channel = self._channels[role.name]
        if role.role == WorkerRole.QUEUE.value:
            queue = prefill_queue_pb2_grpc.PrefillQueueStub(channel)
            stats = (await queue.GetStats(prefill_queue_pb2.GetStatsRequest(), timeout=_ANSWER_S)).stats
            return {"tasks": stats.depth, "leases": stats.leased}
        control = worker_control_pb2_grpc.WorkerControlStub(channel)
        info = await control.GetInfo(worker_control_pb2.GetInfoRequest(), timeout=_ANSWER_S)
        return {"blocks": info.used_blocks, "pins": info.pins, "imports": info.imports, "slots": info.requests}

    async def _topology(self) -> frontend_pb2.Topology:
        frontend = frontend_pb2_grpc.FrontendStub(self.channel)
        return (await frontend.GetTopology(frontend_pb2.GetTopologyRequest(), timeout=_ANSWER_S)).topology

    def _command(self, role: ChaosRole, port: int) -> Sequence[str]:
        options = [part for name, value in ENGINE_OPTIONS.items() for part in ("--engine-option", f"{name}={value}")]
        command = [
            sys.executable, "-m", "kvmesh.cli.main", "serve", role.role, "--exit-with-parent",
            "--discovery", f"etcd://{self.etcd.endpoint}", "--config", str(self._config), "--log-format", "json",
            "--engine", "numpy_llama", "--model", str(self._model), *options,
            "--node", _NODE, "--index", str(role.index), "--port", str(port),
        ]  # fmt: skip
        return command + (["--http-port", "0"] if role.role == FRONTEND else [])

    def _environment(self, role: ChaosRole, advertise_port: int) -> Mapping[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KVMESH_")}
        return {
            **inherited,
            "KVMESH_PROCESS__ADVERTISE_PORT": str(advertise_port),
            "KVMESH_PROCESS__TRANSPORTS": role.transports,
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
