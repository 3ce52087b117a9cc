"""What the composition root makes of `--engine numpy_llama`."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.runtime.engine_registry import EnginePlan, plan_engine
from kvmesh.runtime.settings import EngineSettings
from kvmesh.testing.tiny_model import write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny-llama")


def plan(model: Path | None, **changes: Any) -> EnginePlan:
    return plan_engine(EngineSettings(name="numpy_llama", model=model, **changes))


def test_engine_is_what_folder_and_options_say(folder: Path) -> None:
    made = plan(folder, options={"dtype": "float64", "total_blocks": "20", "block_size": "4"})

    info = made.build("NODE1").info
    assert made.model_name == "tiny-llama"
    assert made.min_uncached_tokens == 1
    assert made.tokenizer is not None
    assert (info.name, info.total_blocks, info.block_size, info.max_context_tokens) == ("numpy_llama", 20, 4, 80)
    assert (info.vocab_size, info.eos_token_ids) == (512, (1,))
    assert info.layout is not None
    assert info.layout.dtype == "float64"


def test_engines_of_one_plan_share_their_weights_and_are_equal_in_layout(folder: Path) -> None:
    made = plan(folder)
    first = made.build("NODE1")
    (folder / "model.safetensors").unlink()  # what is loaded once needs no file

    second = made.build("NODE2")

    assert second.info.layout == first.info.layout
    assert second.kv_memory() is not first.kv_memory()


def test_without_a_model_it_computes_the_one_that_kvmesh_brings_in_blocks_of_four_tokens() -> None:
    default, given = plan_engine(EngineSettings()), plan(None, options={"block_size": "8"})

    assert default.model_name == "speaks"
    assert default.min_uncached_tokens == 1
    assert default.tokenizer is not None
    assert default.tokenizer.vocab_size == 512
    assert (default.build("NODE1").info.name, default.build("NODE1").info.block_size) == ("numpy_llama", 4)
    assert given.build("NODE1").info.block_size == 8


def test_name_that_is_given_is_served(folder: Path) -> None:
    assert plan(folder, model_name="mine").model_name == "mine"


def test_model_from_50_million_parameters_on_is_not_tiny(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 400_000}))

    assert plan(folder).min_uncached_tokens == 256


@pytest.mark.parametrize(
    ("changes", "field", "named"),
    [
        ({"speedup": 2.0}, "engine.speedup", "numpy_llama models no time"),
        ({"options": {"dtype": "bfloat16"}}, "dtype", "not one of float32, float64"),
        ({"options": {"blok_size": "1"}}, "blok_size", "of the numpy_llama engine: the nearest is block_size"),
    ],
)
def test_what_it_cannot_be_is_refused_by_name(folder: Path, changes: dict[str, Any], field: str, named: str) -> None:
    with pytest.raises(FixRequestError) as caught:
        plan(**{"model": folder, **changes})

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, field)
    assert named in str(caught.value)


def test_folder_without_weights_is_refused_before_any_worker_starts(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    with pytest.raises(FixRequestError, match=r"has neither model\.safetensors nor"):
        plan(folder)
