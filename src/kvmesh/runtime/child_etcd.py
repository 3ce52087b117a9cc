"""An etcd of one's own, kept running beside the processes that find each other through it."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from kvmesh.core.errors import FixRequestError, Reason, TryElsewhereError
from kvmesh.discovery.embedded_etcd import etcd_command, find_etcd, free_ports
from kvmesh.discovery.etcd_client import EtcdClient, EtcdUnavailableError
from kvmesh.runtime.supervisor import ChildSpec, Supervisor

ETCD = "etcd"
"""The child's name."""
_ETCD_PREFIX = "ETCD_"
_LOOK_AGAIN_S = 0.1


async def start_etcd(
    supervisor: Supervisor, folder: Path, *, within_s: float, check: Callable[[], None]
) -> tuple[str, ...]:
    """Start an etcd that keeps its data in `folder`, and return its endpoints once it answers.

    `check` is called while it does not, to raise where it never will. Raises: FixRequestError(INVALID_FIELD) where
    there is no etcd to start, and what `wait_for_etcd` raises.
    """
    program = find_etcd()
    if program is None:
        raise FixRequestError(
            Reason.INVALID_FIELD,
            "no etcd was found: pip install 'kvmesh[etcd]', put etcd on the PATH, "
            "or name a cluster, --discovery etcd://HOST:PORT",
            field="discovery.store",
        )
    client_port, peer_port = free_ports(2)
    command = etcd_command(program, folder=folder, client_port=client_port, peer_port=peer_port)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_ETCD_PREFIX)}
    supervisor.start(ChildSpec(ETCD, command, environment, reads_stdin=False, output_level="info"))
    endpoints = (f"127.0.0.1:{client_port}",)
    await wait_for_etcd(endpoints, within_s=within_s, check=check)
    return endpoints


async def wait_for_etcd(endpoints: tuple[str, ...], *, within_s: float, check: Callable[[], None]) -> None:
    """Wait until a cluster answers; see `start_etcd` for `check`. Raises: TryElsewhereError(NO_WORKERS)."""
    client = EtcdClient(endpoints)
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    await client.get(b"ready")
                    return
                except EtcdUnavailableError:
                    check()
                    await asyncio.sleep(_LOOK_AGAIN_S)
    except TimeoutError as exc:
        raise TryElsewhereError(
            Reason.NO_WORKERS,
            f"etcd at {', '.join(endpoints)} did not answer within {within_s:g} s: is it up?",
        ) from exc
    finally:
        await client.aclose()
