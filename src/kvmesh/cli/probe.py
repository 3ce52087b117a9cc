"""`kvmesh probe`: one health check, told by the exit code."""

import queue
import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.options import CommandFailed, Timeout, check_address

if TYPE_CHECKING:
    import grpc

BAD_FLAGS, CANNOT_CONNECT, RPC_FAILED, NOT_SERVING = 1, 2, 3, 4
"""Exit codes beside 0, serving."""


def probe(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Any gRPC server.", callback=check_address)],
    service: Annotated[str, typer.Option("--service", help="Service to ask about; empty = the process.")] = "",
    timeout: Timeout = 2.0,
) -> None:
    """Ask a server's health (grpc.health.v1).

    Exit code 0: serving, 1: bad flags, 2: cannot connect, 3: the call failed, 4: not serving.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from kvmesh.cli.calls import failure_text
    from kvmesh.services.channels import CHANNEL_OPTIONS

    deadline = time.monotonic() + timeout
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        if not _connects(channel, deadline):
            raise CommandFailed(f"cannot connect to {address}", exit_code=CANNOT_CONNECT)
        request = health_pb2.HealthCheckRequest(service=service)
        left_s = max(deadline - time.monotonic(), 0.001)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=left_s)
        except grpc.RpcError as exc:
            raise CommandFailed(failure_text(exc, address), exit_code=RPC_FAILED) from exc
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise CommandFailed(f"{service or address} is {name}", exit_code=NOT_SERVING)
    typer.echo(name)


def _connects(channel: "grpc.Channel", deadline: float) -> bool:
    """Tell whether a connection comes about in time; a refused one is known at once."""
    from grpc import ChannelConnectivity

    states: queue.SimpleQueue[ChannelConnectivity] = queue.SimpleQueue()
    channel.subscribe(states.put, try_to_connect=True)
    try:
        while True:
            state = states.get(timeout=max(deadline - time.monotonic(), 0))
            if state in (ChannelConnectivity.READY, ChannelConnectivity.TRANSIENT_FAILURE):
                return state is ChannelConnectivity.READY
    except queue.Empty:
        return False
    finally:
        channel.unsubscribe(states.put)
