"""`kvmesh generate`: one request, printed as it arrives."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.options import DEFAULT_TARGET, MAX_TOKENS, CommandFailed, Target, Timeout, within

if TYPE_CHECKING:
    from kvmesh.v1 import frontend_pb2, generation_pb2


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: Annotated[str, typer.Option("--model", help="Model; may be left out while the mesh serves one.")] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            help=f"Tokens to produce at most; 1 to {MAX_TOKENS}.",
            callback=within(1, MAX_TOKENS),
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 = greedy, up to 2.")] = None,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the output when it is whole.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show how the worker was chosen (stderr).")] = False,
    target: Target = DEFAULT_TARGET,
    timeout: Timeout = 300.0,
) -> None:
    """Continue a prompt; Ctrl-C cancels it everywhere.

    The output goes to stdout as it is, and ends with a newline; all else goes to stderr.
    """
    _require_unicode(prompt, "PROMPT")
    _require_unicode(model, "--model")
    import grpc

    from kvmesh.cli.calls import broken_text, open_channel
    from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2

    request = frontend_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(text=prompt),
        model=model,
        sampling=generation_pb2.SamplingParams(max_tokens=max_tokens, temperature=temperature),
        explain=explain,
    )
    started, finished, held, written = frontend_pb2.Started(), None, [], ""
    token_count = 0
    with open_channel(target) as channel:
        try:
            for response in frontend_pb2_grpc.FrontendStub(channel).Generate(request, timeout=timeout):
                token_count += len(response.chunk.token_ids) or len(response.chunk.text.split())
                match response.WhichOneof("event"):
                    case "started":
                        started = response.started
                        if explain:
                            _print_explanation(started)
                    case "chunk" if no_stream:
                        held.append(response.chunk.text)
                    case "chunk":
                        _write(response.chunk.text)
                        written = response.chunk.text or written
                    case "finished":
                        finished = response.finished
        except grpc.RpcError as exc:
            if not token_count:
                raise
            raise CommandFailed(broken_text(exc, target, after=_tokens(token_count))) from exc
        finally:
            if written:
                _end_line(written)  # what comes next, be it an error, begins its own line
    if finished is None:
        raise CommandFailed(f"the stream ended after {_tokens(token_count)} without a result: the output is incomplete")
    if no_stream:
        _write("".join(held))
        _end_line("".join(held))
    typer.secho(footer(started, finished), dim=True, err=True)


def _require_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise CommandFailed(f"{name} is not UTF-8", exit_code=2) from exc


def _write(text: str) -> None:
    """Write output at once; to a pipe or a file byte for byte, also what would colour a terminal."""
    if sys.stdout.isatty():
        typer.echo(text, nl=False)
    else:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()


def _end_line(written: str) -> None:
    """Have what comes next begin its own line, after what was written last."""
    if not written.endswith("\n"):
        _write("\n")


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def footer(started: "frontend_pb2.Started", finished: "generation_pb2.Finished") -> str:
    """Return in one line who served the request and what it consumed."""
    from kvmesh.v1 import generation_pb2

    usage = finished.usage
    reason = generation_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
    prefill = "remote" if started.prefill.remote else "local"
    if started.prefill.reason.startswith("fallback_"):
        prefill += f", as the remote one failed: {started.prefill.reason.removeprefix('fallback_').upper()}"
    return (
        f"[{started.worker_id}: {usage.completion_tokens} tokens, {reason}; prompt {usage.prompt_tokens} tokens, "
        f"{usage.cached_tokens} cached, {started.predicted_cached_tokens} predicted; prefill {prefill}]"
    )


def _print_explanation(started: "frontend_pb2.Started") -> None:
    from kvmesh.cli.console import output_console
    from kvmesh.cli.explanation import explanation_view

    console = output_console(stderr=True)
    if not started.explanation.candidates:  # no router chose
        console.print(started.explanation.note or "the mesh gave no explanation")
        return
    console.print(explanation_view(started.explanation, width=console.width))
