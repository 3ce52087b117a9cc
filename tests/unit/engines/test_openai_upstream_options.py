"""Options of the openai_upstream engine: what does not fit is refused before anything starts."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.engines.openai_upstream_options import OpenAiUpstreamOptions, parse
from kvmesh.engines.tensorrt_llm_options import TensorRtLlmOptions

URL = "http://127.0.0.1:8080/v1"


def test_the_url_alone_is_enough() -> None:
    options = parse({"url": f"{URL}/"})

    assert options.urls == (URL,)
    assert (options.api, options.prompts) == ("completions", "text")


def test_several_urls_are_kept_in_order() -> None:
    assert parse({"url": f"{URL}, https://two/v1/,"}).urls == (URL, "https://two/v1")


def test_each_url_has_its_publisher() -> None:
    options = parse(
        {
            "url": f"{URL},http://two/v1", "prompts": "tokens", "kv_events": "tcp://h:1, tcp://h:2",
            "kv_events_replay": "tcp://h:3,tcp://h:4",
        }
    )  # fmt: skip

    assert [options.event_endpoints(index) for index in (0, 1)] == [
        ("tcp://h:1", "tcp://h:3"),
        ("tcp://h:2", "tcp://h:4"),
    ]


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        pytest.param({}, "url", "is missing", id="no url"),
        pytest.param({"url": " , "}, "url", "is missing", id="only commas"),
        pytest.param({"url": "127.0.0.1:8080"}, "url", "no http", id="no scheme"),
        pytest.param({"url": "ftp://host/v1"}, "url", "no http", id="another scheme"),
        pytest.param({"url": "http:///v1"}, "url", "no http", id="no host"),
        pytest.param({"url": "http://host:99999/v1"}, "url", "no http", id="no port that exists"),
        pytest.param({"url": "http://me:secret@host/v1"}, "url", "api_key_env=VAR", id="a password"),
        pytest.param({"url": f"{URL},{URL}/"}, "url", "twice", id="one server for two workers"),
        pytest.param({"url": URL, "api": "responses"}, "api", "not one of completions, chat", id="another api"),
        pytest.param({"url": URL, "api": "chat", "prompts": "tokens"}, "prompts", "chat", id="a chat of tokens"),
        pytest.param({"url": URL, "kv_events": "tcp://h:1"}, "kv_events", "add prompts=tokens", id="events of tokens"),
        pytest.param({"url": URL, "kv_events_replay": "tcp://h:1"}, "kv_events", "is missing", id="a replay alone"),
        pytest.param(
            {"url": f"{URL},http://two/v1", "prompts": "tokens", "kv_events": "tcp://h:1"},
            "kv_events",
            "1 endpoints for 2 urls",
            id="too few publishers",
        ),
        pytest.param({"url": URL, "token_gap_s": "0"}, "token_gap_s", "not in 0.01", id="no wait at all"),
        pytest.param({"ulr": URL}, "ulr", "the nearest is url", id="a slip"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options: dict[str, str], field: str, message: str) -> None:
    with pytest.raises(FixRequestError, match=message) as caught:
        parse(options)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, field)


def test_a_refused_password_is_not_repeated() -> None:
    with pytest.raises(FixRequestError) as caught:
        parse({"url": "http://me:secret@host/v1"})

    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("engine", "kind"), [("openai_upstream", OpenAiUpstreamOptions), ("tensorrt_llm", TensorRtLlmOptions)]
)
def test_the_document_lists_every_option(engine: str, kind: type[Any]) -> None:
    text = (Path(__file__).parents[3] / "docs" / "engines.md").read_text()
    section = text.split(f"\n## {engine}\n")[1].split("\n## ")[0]

    assert re.findall(r"^\| `(\w+)` \| ", section, re.M) == [option.name for option in fields(kind)]
