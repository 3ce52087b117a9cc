"""What the engine registry makes of the settings of engines that do their work elsewhere."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvmesh.core.errors import FixRequestError, NotServedError
from kvmesh.engines.engine import EngineRequest, PromptForm, Sampling
from kvmesh.runtime.engine_registry import plan_engine
from kvmesh.runtime.mesh import Mesh
from kvmesh.runtime.settings import EngineSettings, load_settings
from kvmesh.testing.engine_contract import attempt, run_all
from kvmesh.testing.openai_upstream_server import OpenAiUpstreamServer
from kvmesh.testing.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture
def server() -> Iterator[OpenAiUpstreamServer]:
    with OpenAiUpstreamServer([{"id": "first"}, {"id": "second"}]) as server:
        yield server


def upstream(server: OpenAiUpstreamServer, *, folder: Path | None = None, **options: str) -> EngineSettings:
    return EngineSettings(name="openai_upstream", model=folder, options={"url": server.url, **options})


def test_the_first_listed_model_is_served_under_its_name(server: OpenAiUpstreamServer) -> None:
    plan = plan_engine(upstream(server))

    assert plan.model_name == "first"
    assert plan.tokenizer is None
    assert plan.min_uncached_tokens == 0  # never remote: the upstream prefills for itself


def test_a_named_model_is_served_without_asking(server: OpenAiUpstreamServer) -> None:
    plan = plan_engine(upstream(server, model="second"))

    assert plan.model_name == "second"
    assert server.request_headers == []


def test_a_worker_reads_text_or_the_tokens_of_the_models_tokenizer(
    server: OpenAiUpstreamServer, tmp_path: Path
) -> None:
    folder = write_tiny_tokenizer(tmp_path / "model")
    by_text = plan_engine(upstream(server)).build("NODE1")
    by_tokens = plan_engine(upstream(server, folder=folder, prompts="tokens")).build("NODE1")
    infos = by_text.info, by_tokens.info
    by_text.close()
    by_tokens.close()

    assert [info.accepts for info in infos] == [frozenset({PromptForm.TEXT}), frozenset({PromptForm.TOKENS})]
    assert [info.vocab_size for info in infos] == [0, 512]


def test_tokens_without_a_tokenizer_are_refused(server: OpenAiUpstreamServer) -> None:
    with pytest.raises(FixRequestError, match="--model DIR") as caught:
        plan_engine(upstream(server, prompts="tokens"))

    assert caught.value.field == "engine.model"


def test_the_key_is_read_from_the_named_variable(server: OpenAiUpstreamServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "k3y")
    engine = plan_engine(upstream(server, api_key_env="SOME_KEY")).build("NODE1")
    engine.close()

    assert {headers["authorization"] for headers in server.request_headers} == {"Bearer k3y"}


def test_a_variable_that_is_not_set_is_named(server: OpenAiUpstreamServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)

    with pytest.raises(FixRequestError, match="SOME_KEY is not set"):
        plan_engine(upstream(server, api_key_env="SOME_KEY"))


@pytest.mark.parametrize(
    ("node", "index", "asked"), [("NODE1", 0, 0), ("NODE2", 1, 1), ("rack", 1, 1), ("gpu1", 0, 0), ("gpu0", 1, 1)]
)
def test_workers_have_the_urls_of_their_indices_whatever_their_nodes_are_called(
    node: str, index: int, asked: int, server: OpenAiUpstreamServer
) -> None:
    with OpenAiUpstreamServer([{"id": "first"}]) as other:
        settings = EngineSettings(name="openai_upstream", options={"url": f"{server.url},{other.url}"})
        engine = plan_engine(settings).build(node, index=index)
        engine.submit(EngineRequest(attempt(1), Sampling(max_tokens=1), text="hello"))
        run_all(engine)
        engine.close()

        assert [len(each.requests) for each in (server, other)] == [1 - asked, asked]


def test_a_process_that_is_told_one_url_takes_it_whatever_its_index(server: OpenAiUpstreamServer) -> None:
    engine = plan_engine(upstream(server)).build("NODE7", index=6)
    engine.submit(EngineRequest(attempt(1), Sampling(max_tokens=1), text="hello"))
    run_all(engine)
    engine.close()

    assert len(server.requests) == 1


def test_an_index_beyond_the_urls_is_refused(server: OpenAiUpstreamServer) -> None:
    plan = plan_engine(upstream(server, url=f"{server.url},http://two/v1"))

    with pytest.raises(FixRequestError, match="2 upstreams, and none for the worker of index 2 on rack") as caught:
        plan.build("rack", index=2)

    assert caught.value.field == "engine.options.url"


@pytest.mark.parametrize(("urls", "decode"), [(1, 2), (2, 1), (2, 3)])
def test_a_mesh_needs_as_many_urls_as_decode_workers(urls: int, decode: int, server: OpenAiUpstreamServer) -> None:
    named = ",".join([server.url, "http://two/v1"][:urls])
    overrides = {"engine.name": "openai_upstream", "engine.options": {"url": named}, "mesh.decode": decode}
    settings = load_settings(overrides=overrides).settings

    with pytest.raises(FixRequestError, match=f"--decode {urls}, and not for {decode}") as caught:
        Mesh(settings)

    assert caught.value.field == "mesh.decode"


def test_speedup_is_for_simulated_engines(server: OpenAiUpstreamServer) -> None:
    settings = EngineSettings(name="openai_upstream", options={"url": server.url}, speedup=2.0)

    with pytest.raises(FixRequestError, match="models no time"):
        plan_engine(settings)


@pytest.mark.skipif(find_spec("tensorrt_llm") is not None, reason="the package is here")
def test_tensorrt_llm_without_its_package_says_what_to_install(tmp_path: Path) -> None:
    plan = plan_engine(EngineSettings(name="tensorrt_llm", model=write_tiny_tokenizer(tmp_path / "model")))

    with pytest.raises(NotServedError, match="engine unavailable"):
        plan.build("NODE1")


def test_tensorrt_llm_without_a_model_is_refused() -> None:
    with pytest.raises(FixRequestError, match="--model DIR"):
        plan_engine(EngineSettings(name="tensorrt_llm"))
