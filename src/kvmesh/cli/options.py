"""What commands share: their common options, the form of their help, and how they fail."""

from typing import Annotated

import typer

DEFAULT_TARGET = "127.0.0.1:50051"
"""Where `kvmesh up` serves gRPC unless told otherwise."""


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
    if not host or not port.isdecimal() or not 0 < int(port) <= 65_535:
        raise typer.BadParameter(f"{address!r} is not HOST:PORT, e.g. {DEFAULT_TARGET}")
    return address


Target = Annotated[
    str,
    typer.Option("--target", metavar="HOST:PORT", help="The mesh's gRPC address.", callback=check_address),
]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Give up after this long.")]
