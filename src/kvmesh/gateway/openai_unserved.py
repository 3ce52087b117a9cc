"""What the OpenAI API has and is not served here: refused by its name where it asks for something.

A field that changes the answer is never ignored; one whose value asks for nothing is let through, because clients send
many of those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from kvmesh.wire.validation import invalid

UNSERVED: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "suffix": (None, ""),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "reasoning_effort": (None,),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "verbosity": (None,),
}
"""Fields of the API that are not served, with the values that ask for nothing."""

ABOUT_THE_CALLER = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"}
)
"""Fields that change no answer here."""

_UNSERVED_IN_MESSAGES: dict[str, tuple[object, ...]] = {
    "name": (None, ""),
    "refusal": (None,),
    "audio": (None,),
    "annotations": (None, []),
    "function_call": (None,),
    "tool_calls": (None, []),
}
"""What clients send along when they pass an earlier answer back."""


def without_unserved(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is left of a body to look at. Raises: FixRequestError naming a field that is not served."""
    served = _without(body, UNSERVED, path="")
    served = {name: item for name, item in served.items() if name not in ABOUT_THE_CALLER}
    messages = served.get("messages")
    if isinstance(messages, list):
        served["messages"] = [
            _without(item, _UNSERVED_IN_MESSAGES, path=f"messages[{index}].") if isinstance(item, Mapping) else item
            for index, item in enumerate(messages)
        ]
    return served


def _without(value: Mapping[str, Any], neutral: Mapping[str, Sequence[object]], *, path: str) -> dict[str, Any]:
    """Return what is left to look at. Raises: FixRequestError naming a field that asks for what is not served."""
    for name, item in value.items():
        if name in neutral and item not in neutral[name]:
            allowed = [f"send {orjson.dumps(value).decode()}" for value in neutral[name] if value is not None]
            advice = " or ".join(["leave it out", *allowed])
            raise invalid(f"{path}{name}", f"not supported: {advice}")
    return {name: item for name, item in value.items() if name not in neutral}
