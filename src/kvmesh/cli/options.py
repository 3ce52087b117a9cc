"""What commands share: their common options, the form of their help, and how they fail."""

import os
import re
from collections.abc import Callable
from typing import Annotated

import typer

DEFAULT_TARGET = "127.0.0.1:50051"
"""Where `kvmesh up` serves gRPC unless told otherwise."""
MAX_SECONDS = 86_400
"""Longest wait that a flag can ask for; the mesh refuses longer deadlines."""
MAX_TOKENS = 2**32 - 1
"""Most that the contract's uint32 holds."""

_HOST = re.compile(r"\[[^\[\]/\s]+\]|[^:/\[\]\s]+")
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}
"""Who binds all addresses answers at this one."""


class CommandFailed(typer.TyperException):
    """Ends a command with one `error:` line per line of the text, and this exit code."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def examples(*lines: str) -> str:
    """Return the end of a command's help: its examples, kept on their own lines."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def check_address(address: str) -> str:
    """Return the address if it is HOST:PORT. Raises: typer.BadParameter."""
    host, _, port = address.rpartition(":")
    if not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) <= 65_535:
        raise typer.BadParameter(f"{address!r} is not HOST:PORT, e.g. {DEFAULT_TARGET}")
    return address


def within(low: float, high: float) -> Callable[[float | None], float | None]:
    """Return a callback that refuses what is out of this range, infinity and NaN too; it says what was given."""

    def check(number: float | None) -> float | None:
        if number is not None and not low <= number <= high:
            raise typer.BadParameter(f"{number!r} is out of range: {low!r} to {high!r}")
        return number

    return check


def _target(context: typer.Context, parameter: typer.CallbackParam, address: str) -> str:
    """Return the address given or, without one, where the environment has `kvmesh up` serve. Raises: BadParameter."""
    source = context.get_parameter_source(parameter.name or "")
    if source is not None and source.name != "DEFAULT":
        return check_address(address)
    address = default_target()
    try:
        return check_address(address)
    except typer.BadParameter as exc:
        problem = f"KVMESH_GRPC__HOST and KVMESH_GRPC__PORT make {address!r} of its default: say where the mesh is"
        raise typer.BadParameter(problem) from exc


def default_target() -> str:
    """Return where `kvmesh up` serves gRPC by the environment; to load all settings would slow every call down."""
    given = {name.upper(): value for name, value in os.environ.items()}
    host, _, port = DEFAULT_TARGET.rpartition(":")
    host = given.get("KVMESH_GRPC__HOST") or host
    host = _WILDCARDS.get(host, f"[{host}]" if ":" in host and not host.startswith("[") else host)
    return f"{host}:{given.get('KVMESH_GRPC__PORT') or port}"


Target = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="HOST:PORT",
        help="The mesh's gRPC address; KVMESH_GRPC__HOST and KVMESH_GRPC__PORT move its default.",
        callback=_target,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        help=f"Give up after this long; 0.001 to {MAX_SECONDS}.",
        callback=within(0.001, MAX_SECONDS),
    ),
]
Speed = Annotated[
    float,
    typer.Option(
        "--speed",
        metavar="X",
        help="Divides the times between requests; 0.001 to 1000000.",
        callback=within(0.001, 1_000_000),
    ),
]
