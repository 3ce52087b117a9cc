"""`kvmesh drain` and `kvmesh undrain`: empty one worker, and have it work again."""

from typing import Annotated

import typer

from kvmesh.cli.options import DEFAULT_TARGET, MAX_SECONDS, Target, within

_ANSWER_MARGIN_S = 10.0
"""Beyond the drain's own time, for the gateway and the worker to answer."""


WorkerId = Annotated[str, typer.Argument(metavar="WORKER_ID", help="As `kvmesh status` shows it.")]


def drain(
    worker_id: WorkerId,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help=f"Cancel what still runs after this long; 0 = at once, up to {MAX_SECONDS}.",
            callback=within(0, MAX_SECONDS),
        ),
    ] = 30.0,
    target: Target = DEFAULT_TARGET,
) -> None:
    """Let a worker finish what it runs and take nothing new; returns when it is empty."""
    from kvmesh.cli.calls import open_channel
    from kvmesh.v1 import worker_control_pb2, worker_control_pb2_grpc
    from kvmesh.wire.validation import duration

    request = worker_control_pb2.DrainRequest(worker_id=worker_id, timeout=duration(timeout))
    with open_channel(target) as channel:
        stub = worker_control_pb2_grpc.WorkerControlStub(channel)
        before = stub.GetInfo(worker_control_pb2.GetInfoRequest(worker_id=worker_id), timeout=_ANSWER_MARGIN_S)
        answer = stub.Drain(request, timeout=timeout + _ANSWER_MARGIN_S)
    if before.draining and not before.requests:
        typer.echo(f"{worker_id} was drained already")
        return
    typer.echo(f"{worker_id} is drained: {answer.finished} finished, {answer.cancelled} cancelled")


def undrain(worker_id: WorkerId, target: Target = DEFAULT_TARGET) -> None:
    """Have a drained worker take new work again; a drain that still waits ends, and cancels nothing more."""
    from kvmesh.cli.calls import open_channel
    from kvmesh.v1 import worker_control_pb2, worker_control_pb2_grpc

    with open_channel(target) as channel:
        stub = worker_control_pb2_grpc.WorkerControlStub(channel)
        answer = stub.Undrain(worker_control_pb2.UndrainRequest(worker_id=worker_id), timeout=_ANSWER_MARGIN_S)
    typer.echo(f"{worker_id} takes new work" + ("" if answer.was_draining else ": it did not drain"))
