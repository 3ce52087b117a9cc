"""The NIXL package where it is installed: found, told to keep quiet, imported.

Its wheels are there for Linux alone and claim to need torch, which plain memory does not: so it is no dependency, and
whoever wants it installs `nixl-cu12` without what that asks for. Nothing else here imports it.

A process that has imported grpc_tools (protoc) crashes when it imports NIXL: it is refused there.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from kvmesh.transports.blocks import failed

INSTALL = "pip install --no-deps nixl-cu12==1.5.1"
_PACKAGES = ("nixl_cu12", "nixl_cu13")
_CRASHES_BESIDE = "grpc_tools"
_QUIET = {"NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_LEVEL": "fatal", "UCX_LOG_FILE": "stderr"}
"""What its libraries read when they are loaded; by default UCX writes to stdout. Its errors reach us as exceptions,
and a peer that stops is none to tell of. The user's own settings win."""
_DEVICES = "UCX_NET_DEVICES"


@dataclass(frozen=True, slots=True)
class NixlLibrary:
    """What of the package is used."""

    api: ModuleType
    errors: tuple[type[Exception], ...]
    """All that its calls raise."""

    def create_agent(self, name: str, *, devices: str | None) -> Any:
        """Make an agent over UCX, which listens on `devices` (names as of `ip link`) only; None: on every one.

        Raises: one of `errors`.
        """
        with _environment(_DEVICES, devices):
            return self.api.nixl_agent(name, self.api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def is_installed() -> bool:
    """Tell whether a package is there; it is not imported for that."""
    return any(importlib.util.find_spec(package) is not None for package in _PACKAGES)


@cache
def load() -> NixlLibrary:
    """Import the package, once; a few tenths of a second. Raises: TryElsewhereError(KV_TRANSFER_FAILED)."""
    if _CRASHES_BESIDE in sys.modules:
        raise failed(f"NIXL cannot be imported into a process that has imported {_CRASHES_BESIDE}")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            continue
        try:
            api = importlib.import_module(f"{package}._api")
            bindings = importlib.import_module(f"{package}._bindings")
        except (ImportError, OSError, RuntimeError) as exc:
            raise failed(f"{package} is installed and cannot be imported: {exc}") from exc
        own = (kind for kind in vars(bindings).values() if isinstance(kind, type) and issubclass(kind, Exception))
        return NixlLibrary(api, (*own, RuntimeError, ValueError, TypeError))
    raise failed(f"NIXL is not installed: {INSTALL}")


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set a variable for the time of a call, unless the user has."""
    if value is None or name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
