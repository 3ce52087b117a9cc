"""The openai_upstream engine against the contract suite, in front of a real little server."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from kvmesh.engines.openai_upstream import OpenAiUpstreamEngine
from kvmesh.engines.openai_upstream_options import OpenAiUpstreamOptions
from kvmesh.testing.engine_contract import EngineContract
from kvmesh.testing.openai_upstream_server import OpenAiUpstreamServer


class _UpstreamContract(EngineContract):
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def server(self) -> Iterator[OpenAiUpstreamServer]:
        with OpenAiUpstreamServer() as self._server:
            yield self._server

    def make_engine(
        self, *, total_blocks: int = 64, block_size: int = 4, max_sequences: int = 4
    ) -> OpenAiUpstreamEngine:
        url = self._server.url
        options = OpenAiUpstreamOptions(url=url, block_size=block_size, max_sequences=max_sequences, **self.options)
        return OpenAiUpstreamEngine(options, url=url, vocab_size=1_000)


class TestOpenAiUpstreamText(_UpstreamContract):
    pass


class TestOpenAiUpstreamChat(_UpstreamContract):
    options: ClassVar[dict[str, Any]] = {"api": "chat"}


class TestOpenAiUpstreamTokens(_UpstreamContract):
    options: ClassVar[dict[str, Any]] = {"prompts": "tokens"}
