"""The OpenAPI 3.1 document of the REST routes, made from their descriptors, and the page to read and to try it."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import metadata, resources
from typing import Any

import orjson
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.rpc import status_pb2
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kvmesh.gateway.contract_comments import contract_comments
from kvmesh.gateway.json_schemas import Schema, Schemas
from kvmesh.gateway.request_binding import is_structured
from kvmesh.gateway.rest_routes import RestRoutes
from kvmesh.gateway.routes import HttpRule, field_at

_ABOUT = (
    "Every route is one method of the gRPC contract, by its `google.api.http` annotation.\n\n"
    "JSON in takes proto names and JSON names, JSON out has proto names; 64-bit integers are texts. "
    'A streaming method answers one line of JSON per message, `{"result": {...}}`, or server-sent events of the same '
    "where `Accept: text/event-stream` asks for them; an error after the first message is the last one, "
    '`{"error": {...}}`, under status 200. Every reply has an `x-request-id`. '
    "A header `Grpc-Metadata-Name` is gRPC metadata `name`. The OpenAI API is beside these, under `/v1`."
)
_ERROR = "The error as google.rpc.Status: the first detail is an ErrorInfo, whose reason is stable."
_SLASHES = 'May hold several segments: send "/" as it is.'
_TIMEOUT = {
    "name": "Grpc-Timeout",
    "in": "header",
    "description": "The most time the call may take: up to 8 digits and one of H M S m u n. 504 beyond it.",
    "schema": {"type": "string", "pattern": "^[0-9]{1,8}[HMSmun]$", "examples": ["20S", "200m"]},
}
_PAGE_FILES = {
    "": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
}


def api_document_routes(rest: RestRoutes) -> list[BaseRoute]:
    """Return the routes of the document and of the page: what is added to `rest` later appears in both."""
    made: tuple[int, bytes] = -1, b""

    async def document(request: Request) -> Response:
        nonlocal made
        if made[0] != rest.revision:
            made = rest.revision, orjson.dumps(api_document(rest.rules, rest.comments))
        return Response(made[1], media_type="application/json")

    async def page(request: Request) -> Response:
        content, media_type = _page_file(request.scope["path"].removeprefix("/docs"))
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return [Route("/openapi.json", document), *(Route(f"/docs{name}", page) for name in _PAGE_FILES)]


def api_document(rules: tuple[HttpRule, ...], comments: Mapping[str, str]) -> dict[str, Any]:
    """Return the document of `rules`; `comments` are added to those of the contract."""
    texts = {**contract_comments(), **comments}
    schemas = Schemas(texts)
    paths: dict[str, dict[str, Any]] = {}
    tags: dict[str, Schema] = {}
    for rule in sorted(
        rules, key=lambda rule: (rule.method.containing_service.full_name, rule.openapi_path, rule.verb)
    ):
        service = rule.method.containing_service
        tags.setdefault(service.full_name, {"name": service.full_name, "description": texts.get(service.full_name, "")})
        operations = paths.setdefault(rule.openapi_path, {})
        operations[rule.verb.lower()] = _operation(rule, schemas, texts)
    error = schemas.of_message(status_pb2.Status.DESCRIPTOR)
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvmesh", "version": metadata.version("kvmesh"), "description": _ABOUT},
        "servers": [{"url": "/"}],
        "tags": list(tags.values()),
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.components.items())),
            "parameters": {"Timeout": _TIMEOUT},
            "responses": {"Error": _reply(_ERROR, {"application/json": error})},
        },
    }


def _operation(rule: HttpRule, schemas: Schemas, texts: Mapping[str, str]) -> Schema:
    text = texts.get(rule.method.full_name, "")
    operation: Schema = {
        "operationId": f"{rule.method.full_name}.{rule.index}" if rule.index else rule.method.full_name,
        "tags": [rule.method.containing_service.full_name],
        "summary": text.partition(". ")[0].rstrip("."),
        "description": text,
        "parameters": [
            *_path_parameters(rule, schemas),
            *_query_parameters(rule, schemas),
            {"$ref": "#/components/parameters/Timeout"},
        ],
        "responses": {"200": _success(rule, schemas), "default": {"$ref": "#/components/responses/Error"}},
    }
    if rule.body:
        body = field_at(rule.method.input_type, rule.body)
        schema = schemas.of_message(rule.method.input_type) if body is None else schemas.of_field(body)
        is_required = schemas.has_required(rule.method.input_type) if body is None else schemas.is_required(body)
        content = {"content": {"application/json": {"schema": schema}}}
        operation["requestBody"] = {**content, "required": True} if is_required else content
    return operation


def _success(rule: HttpRule, schemas: Schemas) -> Schema:
    message = schemas.of_message(rule.method.output_type)
    if not rule.method.server_streaming:
        return _reply("The response.", {"application/json": message})
    item: Schema = {
        "title": f"One of a stream of {rule.method.output_type.name}",
        "type": "object",
        "properties": {"result": message, "error": schemas.of_message(status_pb2.Status.DESCRIPTOR)},
    }
    return _reply("One of these per line, or per event.", {"application/x-ndjson": item, "text/event-stream": item})


def _reply(description: str, content: Mapping[str, Schema]) -> Schema:
    return {
        "description": description,
        "headers": {"x-request-id": {"description": "The mesh's id of the request.", "schema": {"type": "string"}}},
        "content": {media_type: {"schema": schema} for media_type, schema in content.items()},
    }


def _path_parameters(rule: HttpRule, schemas: Schemas) -> Iterator[Schema]:
    for variable in rule.variables:
        field = field_at(rule.method.input_type, variable.field_path)
        assert field is not None, "rules_of refuses such a template"
        schema = schemas.of_field(field)
        text = schema.pop("description", "")
        yield {
            "name": variable.field_path,
            "in": "path",
            "required": True,
            "description": f"{text} {_SLASHES}".strip() if variable.spans_segments else text,
            "schema": {**schema, "minLength": 1} if schema.get("type") == "string" else schema,
            **({"x-spans-segments": True} if variable.spans_segments else {}),
        }


def _query_parameters(rule: HttpRule, schemas: Schemas) -> Iterator[Schema]:
    if rule.body == "*":
        return
    bound = {variable.field_path for variable in rule.variables} | {rule.body}
    for name, field in _leaves(rule.method.input_type, "", ()):
        if name in bound or name.partition(".")[0] in bound:
            continue
        schema = schemas.of_field(field)
        text = schema.pop("description", "")
        required = {"required": True} if "." not in name and schemas.is_required(field) else {}
        yield {"name": name, "in": "query", "description": text, "schema": schema, **required}


def _leaves(message: Descriptor, prefix: str, within: tuple[Descriptor, ...]) -> Iterator[tuple[str, FieldDescriptor]]:
    """Yield the fields that a query parameter can set, by their paths; a message inside itself is left out."""
    parents = (*within, message)
    for field in message.fields:
        name = f"{prefix}{field.name}"
        if not is_structured(field):
            yield name, field
        elif (kind := _parent_of_leaves(field)) is not None and kind not in parents:
            yield from _leaves(kind, f"{name}.", parents)


def _parent_of_leaves(field: FieldDescriptor) -> Descriptor | None:
    kind = field.message_type
    return None if field.is_repeated or kind is None or kind.file.package == "google.protobuf" else kind


@lru_cache(maxsize=len(_PAGE_FILES))
def _page_file(name: str) -> tuple[bytes, str]:
    file, media_type = _PAGE_FILES[name]
    return (resources.files("kvmesh.gateway") / "docs_page" / file).read_bytes(), media_type
