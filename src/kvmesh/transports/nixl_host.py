"""What of a host NIXL may use: an RDMA fabric, or that processes read each other's memory."""

import ctypes
import ipaddress
import os
from hashlib import blake2b
from pathlib import Path

from kvmesh.transports.blocks import failed

FABRIC = Path("/sys/class/infiniband")
LOOPBACK_DEVICE = "lo"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACES = (Path("/proc/self/ns/net"), Path("/proc/self/ns/pid"), Path("/proc/self/ns/user"))
_TRACING = Path("/proc/sys/kernel/yama/ptrace_scope")
_TRACED_BY_ADMINISTRATORS = 2
"""From this value on; with 1, UCX asks for the processes of its user to be let in."""


class _Span(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


def has_fabric(host: str, fabric: Path = FABRIC) -> bool:
    """Tell whether a worker that binds `host` may use an RDMA device: only if it is not to stay on loopback."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    return not is_loopback and fabric.is_dir() and any(fabric.iterdir())


def host_identity(*, tracing: Path = _TRACING) -> str:
    """Return a digest of what two processes have in common that can read each other's memory.

    Raises: TryElsewhereError(KV_TRANSFER_FAILED) when none can here: UCX would move the bytes through sockets then.
    """
    try:
        facts = (_BOOT_ID.read_text().strip(), os.getuid(), *(path.stat().st_ino for path in _NAMESPACES))
        if tracing.exists() and int(tracing.read_text()) >= _TRACED_BY_ADMINISTRATORS:
            raise failed(f"processes may not read each other's memory here: {tracing}")
        _read_own_memory()
    except (OSError, ValueError) as exc:
        raise failed(f"processes cannot read each other's memory here: {exc}") from exc
    return blake2b("/".join(map(str, facts)).encode(), digest_size=8).hexdigest()


def _read_own_memory() -> None:
    """Make the system call by which others' memory is read; containers may forbid it. Raises: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    source, target = ctypes.create_string_buffer(b"x", 1), ctypes.create_string_buffer(1)
    here, there = (_Span(ctypes.addressof(buffer), 1) for buffer in (target, source))
    call = getattr(libc, "process_vm_readv", None)
    if call is None:
        raise OSError("there is no process_vm_readv")
    call.restype = ctypes.c_ssize_t
    if call(os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0) != 1 or target.raw != b"x":
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
