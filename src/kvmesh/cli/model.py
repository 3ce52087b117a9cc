"""`kvmesh model`: what there is to do with model folders."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cli.options import CommandFailed


def make_tiny(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; made if need be.", show_default=False)],
) -> None:
    """Write a tiny Llama model with its tokenizer: real to every engine that reads one, and of no use to people.

    Half a megabyte of random weights, the same at every run.
    """
    from kvmesh.core.errors import MeshError
    from kvmesh.testing.tiny_model import write_tiny_model

    try:
        write_tiny_model(folder)
    except MeshError as exc:
        raise CommandFailed(str(exc)) from exc
    except OSError as exc:
        raise CommandFailed(f"{folder} cannot be written: {exc.strerror}") from exc
    typer.echo(f"{folder} holds a tiny Llama model: kvmesh up --engine numpy_llama --model {shlex.quote(str(folder))}")
