"""A contract as the text of a .proto file, for other languages' compilers."""

from collections.abc import Iterator

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from kvmesh.wire.comments import comments_of

_FIELD = FieldDescriptorProto


def proto_source(file: FileDescriptorProto) -> str:
    """Return the text of a contract's own file: messages, one service, its HTTP annotations, the comments."""
    return "\n".join(_Printer(file).lines()) + "\n"


class _Printer:
    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = comments_of(file)

    def lines(self) -> Iterator[str]:
        file = self._file
        yield 'syntax = "proto3";'
        yield ""
        yield f"package {file.package};"
        yield ""
        yield from (f'import "{name}";' for name in sorted(file.dependency))
        for service in file.service:
            yield ""
            yield from self._comment(service.name, "")
            yield f"service {service.name} {{"
            for method in service.method:
                yield from self._comment(f"{service.name}.{method.name}", "  ")
                answer = f"{'stream ' if method.server_streaming else ''}{self._short(method.output_type)}"
                yield f"  rpc {method.name}({self._short(method.input_type)}) returns ({answer}) {{"
                rule = method.options.Extensions[annotations_pb2.http]
                yield "    option (google.api.http) = {"
                yield f'      post: "{rule.post}"'
                yield f'      body: "{rule.body}"'
                yield "    };"
                yield "  }"
            yield "}"
        for message in file.message_type:
            yield ""
            yield from self._comment(message.name, "")
            yield from self._message(message)

    def _message(self, message: DescriptorProto) -> Iterator[str]:
        if not message.field:
            yield f"message {message.name} {{}}"
            return
        yield f"message {message.name} {{"
        for field in message.field:
            yield from self._comment(f"{message.name}.{field.name}", "  ")
            yield f"  {self._field_type(message, field)} {field.name} = {field.number};"
        yield "}"

    def _field_type(self, message: DescriptorProto, field: FieldDescriptorProto) -> str:
        entry = next(
            (one for one in message.nested_type if field.type_name.endswith(f".{message.name}.{one.name}")), None
        )
        if entry is not None:
            return f"map<{self._type(entry.field[0])}, {self._type(entry.field[1])}>"
        prefix = "repeated " if field.label == _FIELD.LABEL_REPEATED else "optional " if field.proto3_optional else ""
        return f"{prefix}{self._type(field)}"

    def _type(self, field: FieldDescriptorProto) -> str:
        if field.type in (_FIELD.TYPE_MESSAGE, _FIELD.TYPE_ENUM):
            return self._short(field.type_name)
        return _FIELD.Type.Name(field.type).removeprefix("TYPE_").lower()

    def _short(self, type_name: str) -> str:
        own = f".{self._file.package}."
        return type_name.removeprefix(own) if type_name.startswith(own) else type_name.removeprefix(".")

    def _comment(self, name: str, indent: str) -> Iterator[str]:
        text = self._comments.get(f"{self._file.package}.{name}", "")
        for line in text.splitlines():
            yield f"{indent}// {line}".rstrip()
