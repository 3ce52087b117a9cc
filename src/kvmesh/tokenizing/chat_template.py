"""Chat templates as Hugging Face models carry them: Jinja, sandboxed, with the few names that templates expect."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from kvmesh.core.errors import FixRequestError, Reason

_FIELD = "prompt.messages"
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template raises of its own, and what its expressions raise on content it does not foresee."""


class ChatTemplate:
    """One model's template, compiled."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`; `special_tokens` are its names such as `bos_token`. Raises: jinja2.TemplateError."""
        self._special_tokens = dict(special_tokens)
        self._template = _environment().from_string(source)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return the prompt of a conversation of (role, content), ready for the assistant's answer.

        Raises:
            FixRequestError: INVALID_FIELD, when the template refuses or cannot read the messages.
        """
        try:
            return self._template.render(
                messages=[{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except _TEMPLATE_ERRORS as exc:
            raise FixRequestError(
                Reason.INVALID_FIELD, f"{_FIELD}: the model's chat template refused it: {exc}", field=_FIELD
            ) from exc


def no_template() -> FixRequestError:
    """Return the error of a conversation sent to a model that has no template."""
    return FixRequestError(
        Reason.INVALID_FIELD, f"{_FIELD}: the model has no chat template: send prompt.text", field=_FIELD
    )


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's turns for training; here it only lets its body through."""

    tags = {"generation"}  # noqa: RUF012  # the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own filter escapes for HTML; models were trained on text with these very spaces and no escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
