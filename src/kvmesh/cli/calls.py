"""Calls to a mesh from the command line: synchronous, each with a deadline, each failure one readable line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_status import rpc_status

from kvmesh.cli.options import CommandFailed
from kvmesh.core.errors import Reason
from kvmesh.services.channels import CHANNEL_OPTIONS
from kvmesh.wire import error_catalog


@contextmanager
def open_channel(target: str) -> Iterator[grpc.Channel]:
    """Open a channel for the commands' calls; leaving cancels those that still run. Raises: CommandFailed."""
    with grpc.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        try:
            yield channel
        except grpc.RpcError as exc:
            raise CommandFailed(failure_text(exc, target)) from exc


def failure_text(error: Any, target: str) -> str:
    """Say what a failed call means: the mesh's own reason and text, or what keeps us from the mesh."""
    status = rpc_status.from_call(error)
    if status is None:  # gRPC itself ended the call
        return _transport_text(error.code(), error.details() or "", target)
    failure = error_catalog.from_status(status)
    says_it_all = failure.reason is Reason.INVALID_FIELD and failure.message
    text = f"{failure.reason.value}: {failure.message if says_it_all else status.message}"
    if failure.field is not None and failure.field not in text:
        text += f" (field {failure.field})"
    if failure.retry_after_s is not None:
        text += f" (try again in {failure.retry_after_s:g} s)"
    return text


def broken_text(error: Any, target: str, *, after: str) -> str:
    """Say what ended a stream that had begun; `after` says how far it was."""
    is_lost = rpc_status.from_call(error) is None and error.code() is grpc.StatusCode.UNAVAILABLE
    text = f"the connection to {target} was lost" if is_lost else failure_text(error, target)
    return f"the stream broke after {after}: {text}"


def _transport_text(code: grpc.StatusCode, details: str, target: str) -> str:
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            if "Expected SETTINGS frame" in details:  # whoever listens there answered, but not in HTTP/2
                return f"{target} does not speak gRPC: is it the HTTP port? --target wants that of gRPC"
            cause = details.rpartition(": ")[2]
            return f"cannot reach {target} ({cause}): start a mesh with `kvmesh up`, or name another with --target"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer from {target} in time: allow more with --timeout, or look at `kvmesh probe {target}`"
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"{target} does not serve this call: is it the gRPC address of a mesh?"
        case _:
            return f"{code.name}: {details}"
