"""What the huggingface engine refuses before torch is imported: folders, options, and an environment without it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmesh.core.errors import FixRequestError, NotServedError, Reason
from kvmesh.engines.huggingface_folder import check_folder, require_packages
from kvmesh.engines.huggingface_options import parse
from kvmesh.runtime.engine_registry import plan_engine
from kvmesh.runtime.settings import EngineSettings
from kvmesh.testing.tiny_model import write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)


def settings_of(folder: Path | None, **changes: Any) -> EngineSettings:
    return EngineSettings(name="huggingface", model=folder, **changes)


def test_size_of_a_folder_is_that_of_its_weights(folder: Path) -> None:
    assert check_folder(folder) == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": None}, "config.json names no model_type"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is set.*take the model's unquantised"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is_encoder_decoder is true.*'t5'"),
    ],
)
def test_configuration_that_is_not_run_is_refused_by_name(folder: Path, changes: dict[str, Any], named: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    with pytest.raises(FixRequestError, match=named) as caught:
        check_folder(folder)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "engine.model")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("config.json", None, "has no config.json: give the folder of a Hugging Face model"),
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "config.json names no model_type"),
        ("model.safetensors", None, "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_broken_folder_is_refused_by_name(folder: Path, name: str, content: str | None, named: str) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)

    with pytest.raises(FixRequestError, match=named):
        check_folder(folder)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device": "gpu"}, "device is 'gpu', not cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "device is 'cuda:x'"),
        ({"dtype": "float16"}, "dtype is 'float16', not one of float32, float64, bfloat16"),
        ({"total_blocks": "0"}, "total_blocks is 0, not in 1.."),
        ({"devise": "cpu"}, "devise is no option of the huggingface engine"),
    ],
)
def test_bad_option_is_refused_by_name(options: dict[str, str], named: str) -> None:
    with pytest.raises(FixRequestError, match=named):
        parse(options)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:3"])
def test_devices_are_a_cpu_and_gpus_by_number(device: str) -> None:
    assert parse({"device": device}).device == device


@pytest.mark.usefixtures("no_torch")
def test_without_the_packages_the_error_says_what_to_install() -> None:
    with pytest.raises(NotServedError, match=r"engine unavailable: .*pip install 'kvmesh\[hf\]'") as caught:
        require_packages()

    assert caught.value.reason is Reason.UNIMPLEMENTED


@pytest.mark.usefixtures("no_torch")
def test_plan_needs_the_packages_only_to_make_an_engine(folder: Path) -> None:
    """A frontend of such a mesh runs where torch is not."""
    plan = plan_engine(settings_of(folder))

    with pytest.raises(NotServedError, match="engine unavailable"):
        plan.build("node")

    assert (plan.model_name, plan.min_uncached_tokens) == ("tiny", 1)
    assert plan.tokenizer is not None


@pytest.mark.parametrize(
    ("changes", "field"), [({"folder": None}, "engine.model"), ({"speedup": 2.0}, "engine.speedup")]
)
def test_plan_names_the_setting_that_is_wrong(folder: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(FixRequestError) as caught:
        plan_engine(settings_of(**{"folder": folder, **changes}))

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, field)
