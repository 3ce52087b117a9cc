"""The `kvmesh` command: what there is, and how every command's failure reaches the terminal and the exit code."""

import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from kvmesh.cli.config import show_config
from kvmesh.cli.drain import drain, undrain
from kvmesh.cli.explain import explain
from kvmesh.cli.generate import generate
from kvmesh.cli.model import make_tiny
from kvmesh.cli.options import examples
from kvmesh.cli.probe import BAD_FLAGS, probe
from kvmesh.cli.proto import print_proto
from kvmesh.cli.replay import replay
from kvmesh.cli.serve import serve_role
from kvmesh.cli.serve_flags import spelled_out
from kvmesh.cli.simulate import simulate
from kvmesh.cli.status import status
from kvmesh.cli.streams import give_up_stdout, open_closed_streams
from kvmesh.cli.up import up
from kvmesh.core.suggestions import suggestion

_FLAG = re.compile(r"--[a-zA-Z][\w-]*")
"""What can be meant for a flag; what else begins with a dash is a prompt."""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What writing to a full or broken disk fails with; stdout is the only file that commands write as they please."""

# Typer's rich help and tracebacks would cost 300 ms on every start, also that of a mesh.
app = typer.Typer(name="kvmesh", rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
config_app = typer.Typer(rich_markup_mode=None, help="The settings.", epilog=examples("kvmesh config show"))
model_app = typer.Typer(rich_markup_mode=None, help="Model folders.", epilog=examples("kvmesh model make-tiny ./tiny"))

app.command(
    epilog=examples(
        "kvmesh up",
        "kvmesh up --decode 4 --prefill 2 --engine simulated --speedup 10",
        "kvmesh up --config mesh.toml --http-port 0 --grpc-port 0",
        "kvmesh up --engine simulated --engine-option total_blocks=512 --engine-option block_size=16",
        "kvmesh up --engine simulated --decode 4 --processes",
    )
)(up)
app.command(
    "serve",
    epilog=examples(
        "kvmesh serve queue --discovery etcd://127.0.0.1:2379",
        "kvmesh serve decode --discovery etcd://127.0.0.1:2379 --engine simulated --node rack1",
        "kvmesh serve frontend --discovery etcd://127.0.0.1:2379 --engine simulated --http-port 8000",
        "kvmesh serve hello:Upper --Upper.workers=2 -f hello.yaml",
    ),
)(serve_role)
app.command("proto", epilog=examples("kvmesh proto hello:Upper", "kvmesh proto hello:Upper > hello.proto"))(print_proto)
app.command(
    epilog=examples('kvmesh generate "Tell me a joke"', 'kvmesh generate "Tell me a joke" --max-tokens 32 --explain')
)(generate)
app.command(epilog=examples("kvmesh status", "kvmesh status --json --target 127.0.0.1:50051"))(status)
app.command(
    epilog=examples("kvmesh probe 127.0.0.1:50051", "kvmesh probe 127.0.0.1:50051 --service kvmesh.v1.Frontend")
)(probe)
app.command(epilog=examples("kvmesh drain NODE1/decode/1", "kvmesh drain NODE1/decode/1 --timeout 5"))(drain)
app.command(epilog=examples("kvmesh undrain NODE1/decode/1"))(undrain)
app.command(
    epilog=examples("kvmesh replay conversation_trace.jsonl", "kvmesh replay trace.jsonl --limit 1000 --speed 5 --json")
)(replay)
app.command(
    epilog=examples(
        "kvmesh explain decisions.jsonl", "kvmesh explain decisions.jsonl --policy least_loaded --limit 100"
    )
)(explain)
app.command(
    epilog=examples(
        "kvmesh simulate conversation_trace.jsonl --workers 8",
        "kvmesh simulate trace.jsonl --policy round_robin --policy kv_aware --speed 2 --json",
    )
)(simulate)
config_app.command("show", epilog=examples("kvmesh config show", "kvmesh config show --config mesh.toml"))(show_config)
app.add_typer(config_app, name="config")
model_app.command("make-tiny", epilog=examples("kvmesh model make-tiny ./tiny"))(make_tiny)
app.add_typer(model_app, name="model")


@app.callback(
    invoke_without_command=True,
    epilog=examples("kvmesh up", 'kvmesh generate "Tell me a joke"', "kvmesh status"),
)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    """A gRPC service mesh for LLM inference: one command on a laptop, many machines across a cluster."""
    if version:
        show_version()
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("version", epilog=examples("kvmesh version"))
def show_version() -> None:
    """Show the version."""
    from importlib.metadata import version

    typer.echo(f"kvmesh {version('kvmesh')}")


def set_up_grpc() -> None:
    """Choose what gRPC's core reads once, when it starts; what the environment has already wins."""
    # It tells of every connection's end on stderr, between our log lines.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Its handlers would start its threads again in every child between fork and exec, and one child in six dies of it.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    open_closed_streams()
    set_up_grpc()
    try:
        code = app(
            spelled_out(sys.argv[1:] if arguments is None else arguments), prog_name="kvmesh", standalone_mode=False
        )
    except typer.TyperException as error:
        for line in _failure_text(error).splitlines():
            typer.secho(f"error: {line}", fg="red", err=True)
        sys.exit(_exit_code(error))
    except typer.Abort:
        sys.exit(130)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        typer.secho(f"error: the output cannot be written: {os.strerror(error.errno)}", fg="red", err=True)
        give_up_stdout()
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _failure_text(error: Any) -> str:
    """Return the text of a failure; an unknown flag is answered with a close one, or with all."""
    text: str = error.format_message()
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if context is not None:
        if option is not None and text.startswith("No such option"):
            known = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
            text = f"no such option: {option}; {suggestion(option, [*known, '--help'])}"
            if context.command.name == "generate" and not _FLAG.fullmatch(option):
                text = 'a prompt that begins with a dash goes after --, as in kvmesh generate -- "- list"'
        text = f"{text[:1].lower()}{text[1:].rstrip('.')} (see {context.command_path} --help)"
    return text


def _exit_code(error: Any) -> int:
    context = getattr(error, "ctx", None)
    if context is not None and context.command.name == "probe":
        return BAD_FLAGS
    return int(error.exit_code)


if __name__ == "__main__":
    main()
