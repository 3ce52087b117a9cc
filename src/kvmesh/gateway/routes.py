"""REST routes from the google.api.http annotations in descriptors; nothing here knows a route by its name.

Path templates are those of google/api/http.proto: literals, `*`, `**`, `{field}`, `{field=pattern}` and a `:verb` at
the end. Patterns match the path as it was sent, percent-encoding included: an encoded "/" never splits a segment.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor

_VARIABLE = re.compile(r"\{([A-Za-z_][\w.]*)(?:=([^}]*))?\}")
_WILDCARD = re.compile(r"(\*\*|\*)")
_ENCODED_SLASH = re.compile(r"(%2[Ff])")


@dataclass(frozen=True, slots=True)
class PathVariable:
    """A field of the request that is part of the path."""

    field_path: str
    """Proto names, joined by dots."""
    spans_segments: bool
    """True: "/" may occur in it, and an encoded "/" stays encoded, as http.proto asks."""

    def decode(self, raw: str) -> str:
        """Return the value of a matched piece of the path."""
        if not self.spans_segments:
            return unquote(raw)
        return "".join(part if _ENCODED_SLASH.fullmatch(part) else unquote(part) for part in _ENCODED_SLASH.split(raw))


@dataclass(frozen=True, slots=True)
class HttpRule:
    """One way to call one method over HTTP."""

    verb: str
    template: str
    body: str
    """ "*" = the body is the whole request; a field's name = it is that field; "" = there is none."""
    method: MethodDescriptor
    pattern: re.Pattern[str]
    variables: tuple[PathVariable, ...]
    index: int = 0
    """Position among the method's rules: 0 = its own, then the additional bindings."""

    @property
    def openapi_path(self) -> str:
        """The template without what its variables must look like, as OpenAPI writes it."""
        return _VARIABLE.sub(r"{\1}", self.template)

    def match(self, raw_path: str) -> dict[str, str] | None:
        """Return the path's values by field path, or None where the path is another's."""
        found = self.pattern.fullmatch(raw_path)
        if found is None:
            return None
        return {
            variable.field_path: variable.decode(raw)
            for variable, raw in zip(self.variables, found.groups(), strict=True)
        }


def rules_of(services: Iterable[ServiceDescriptor]) -> Sequence[HttpRule]:
    """Return the rules of all annotated methods, the more specific path first.

    Raises: ValueError for an annotation that cannot be served, or two of one verb and path.
    """
    rules = [
        _rule(http, method, index)
        for service in services
        for method in service.methods
        for index, http in enumerate(_annotations(method))
    ]
    seen: dict[tuple[str, str], HttpRule] = {}
    for rule in rules:
        other = seen.setdefault((rule.verb, rule.pattern.pattern), rule)
        if other is not rule:
            raise ValueError(f"{rule.method.full_name} and {other.method.full_name} share {rule.verb} {rule.template}")
    return sorted(rules, key=_breadth)


def field_at(message: Descriptor, field_path: str) -> FieldDescriptor | None:
    """Return the field at a dotted path of proto or JSON names; None where there is none."""
    *parents, last = field_path.split(".")
    for name in parents:
        parent = find_field(message, name)
        if parent is None or parent.message_type is None or parent.is_repeated:
            return None
        message = parent.message_type
    return find_field(message, last)


def find_field(message: Descriptor, name: str) -> FieldDescriptor | None:
    """Return the field of this proto or JSON name."""
    by_name = message.fields_by_name.get(name)
    return by_name or next((field for field in message.fields if field.json_name == name), None)


def _annotations(method: MethodDescriptor) -> Iterator[http_pb2.HttpRule]:
    options = method.GetOptions()
    if options.HasExtension(annotations_pb2.http):
        rule = options.Extensions[annotations_pb2.http]
        yield rule
        yield from rule.additional_bindings


def _rule(http: http_pb2.HttpRule, method: MethodDescriptor, index: int) -> HttpRule:
    kind = http.WhichOneof("pattern")
    if kind is None or kind == "custom" or http.response_body or method.client_streaming:
        raise ValueError(f"{method.full_name}: this annotation cannot be served: {http}")
    template = getattr(http, kind)
    pattern, variables = _compile(template)
    bound = [variable.field_path for variable in variables] + [http.body] * (http.body not in {"", "*"})
    for field_path in bound:
        if field_at(method.input_type, field_path) is None:
            raise ValueError(f"{method.full_name}: {template}: {method.input_type.full_name} has no {field_path}")
    for variable in variables:
        field = field_at(method.input_type, variable.field_path)
        if field is not None and (field.is_repeated or field.message_type is not None):
            raise ValueError(f"{method.full_name}: {template}: {variable.field_path} is no single value")
    return HttpRule(kind.upper(), template, http.body, method, pattern, variables, index)


def _compile(template: str) -> tuple[re.Pattern[str], tuple[PathVariable, ...]]:
    pattern, variables, position = [], [], 0
    for found in _VARIABLE.finditer(template):
        field_path, inner = found[1], found[2] or "*"
        pattern += [_segments(template[position : found.start()]), f"({_segments(inner)})"]
        variables.append(PathVariable(field_path, spans_segments="/" in inner or "**" in inner))
        position = found.end()
    pattern.append(_segments(template[position:]))
    return re.compile("".join(pattern)), tuple(variables)


def _segments(text: str) -> str:
    wildcards = {"*": "[^/]+", "**": ".+"}
    return "".join(wildcards.get(part) or re.escape(part) for part in _WILDCARD.split(text))


def _breadth(rule: HttpRule) -> tuple[int, int, int]:
    """Fewer `**` first, then fewer `*`, then more literal text: `/a/b` before `/a/{b}:verb` before `/a/{b}`."""
    bare = _VARIABLE.sub(lambda found: found[2] or "*", rule.template)
    return bare.count("**"), bare.replace("**", "").count("*"), -len(bare)
