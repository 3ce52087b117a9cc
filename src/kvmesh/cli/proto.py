"""`kvmesh proto module:Class`: the contract of a class of the SDK, for other languages."""

from typing import Annotated

import typer

from kvmesh.cli.options import CommandFailed


def print_proto(
    target: Annotated[str, typer.Argument(help="A class of the SDK, e.g. hello:Upper.", metavar="MODULE:CLASS")],
) -> None:
    """Print the .proto file of a class: what protoc makes stubs of, for any language."""
    from kvmesh.core.errors import FixRequestError
    from kvmesh.runtime.component_loading import load_graph
    from kvmesh.sdk.contract import contract_of
    from kvmesh.sdk.proto_source import proto_source

    try:
        graph = load_graph(target)
    except FixRequestError as exc:
        raise CommandFailed(f"{exc.reason.value}: {exc.message}", exit_code=2) from exc
    typer.echo(proto_source(contract_of(graph.services[-1]).file), nl=False)
