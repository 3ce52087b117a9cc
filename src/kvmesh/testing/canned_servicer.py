"""A servicer for any service, made from its descriptor: for tests of doors that do not know what they pass on."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

FAIL_KEY = "x-fail-with"
"""Metadata key of a call that is to fail: the number of its gRPC code."""
_DEEPEST = 4
_TIMES = {"google.protobuf.Duration", "google.protobuf.Timestamp"}


class CannedServicer:
    """Has every method of a service, to be called by generated code or by a REST route.

    A method whose response is its request answers with it, any other with a message that has something in every field;
    a stream goes on with an empty message.
    """

    def __init__(self, service: ServiceDescriptor) -> None:
        self._service = service
        for method in service.methods:
            if hasattr(type(self), method.name):  # a subclass has its own
                continue
            setattr(self, method.name, self._stream(method) if method.server_streaming else self._unary(method))

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return what a gRPC server is to serve."""
        made: dict[str, Any] = {}
        for method in self._service.methods:
            make = (
                grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
            )
            made[method.name] = make(
                getattr(self, method.name),
                message_factory.GetMessageClass(method.input_type).FromString,
                lambda message: message.SerializeToString(),
            )
        return grpc.method_handlers_generic_handler(self._service.full_name, made)

    def _unary(self, method: MethodDescriptor) -> Any:
        async def answer(request: Message, context: Any) -> Message:
            await _fail_if_asked(context)
            return _response(method, request)

        return answer

    def _stream(self, method: MethodDescriptor) -> Any:
        async def answer(request: Message, context: Any) -> AsyncIterator[Message]:
            await _fail_if_asked(context)
            yield _response(method, request)
            yield message_factory.GetMessageClass(method.output_type)()

        return answer


def filled(descriptor: Descriptor, depth: int = 0) -> Message:
    """Return a message with something that is no default in every field, a few levels deep."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        kind = field.message_type
        if kind is None:
            value = _sample(field)
            if field.is_repeated:
                getattr(message, field.name).extend([value, value])
            else:
                setattr(message, field.name, value)
        elif kind.GetOptions().map_entry:
            if kind.fields_by_name["value"].message_type is None:
                getattr(message, field.name)["k/ü"] = _sample(kind.fields_by_name["value"])
        elif depth < _DEEPEST:
            target = getattr(message, field.name)
            (target.add() if field.is_repeated else target).CopyFrom(filled(kind, depth + 1))
    return message


def _response(method: MethodDescriptor, request: Message) -> Message:
    return request if method.input_type is method.output_type else filled(method.output_type)


def _sample(field: FieldDescriptor) -> Any:
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    if field.type == FieldDescriptor.TYPE_BYTES:
        return b"\x00\xff\xfe"
    samples: dict[int, Any] = {
        FieldDescriptor.CPPTYPE_STRING: 'h"é/\u2028<\n',
        FieldDescriptor.CPPTYPE_BOOL: True,
        FieldDescriptor.CPPTYPE_DOUBLE: 0.375,
        FieldDescriptor.CPPTYPE_FLOAT: 0.375,
        FieldDescriptor.CPPTYPE_INT64: 2**53 + 1,
        FieldDescriptor.CPPTYPE_UINT64: 2**53 + 1,
    }
    if field.containing_type is not None and field.containing_type.full_name in _TIMES:
        return 3  # of any other number not every one is a time
    return samples.get(field.cpp_type, 7)


async def _fail_if_asked(context: Any) -> None:
    wanted = dict(context.invocation_metadata()).get(FAIL_KEY)
    if wanted is None:
        return
    status = status_pb2.Status(code=int(wanted), message="Ünable, 100%")
    info = error_details_pb2.ErrorInfo(reason="WHY", domain="kvmesh", metadata={"field": "a.b", "n": "1"})
    status.details.add().Pack(info)
    await context.abort_with_status(rpc_status.to_status(status))
