"""A mesh put together by hand, as on many machines: each role a `kvmesh serve` of its own, over one etcd.

with RoleCluster() as cluster:
    cluster.serve("queue")
    decode = cluster.serve("decode", "--node", "rack1")
"""

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from kvmesh.testing.etcd_server import EtcdServer
from kvmesh.testing.mesh_process import RoleProcess


class RoleCluster:
    """Roles over one store; all of them end with the `with` block."""

    def __init__(self) -> None:
        """Start the store when the block begins."""
        self._stack = ExitStack()
        self._store = ""

    def __enter__(self) -> Self:
        self._store = f"etcd://{self._stack.enter_context(EtcdServer()).endpoint}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def serve(self, role: str, *flags: str) -> RoleProcess:
        """Start a role with the engine `echo`, and return once it listens. Raises: AssertionError if it does not."""
        return self._stack.enter_context(RoleProcess(role, "--engine", "echo", "--discovery", self._store, *flags))
