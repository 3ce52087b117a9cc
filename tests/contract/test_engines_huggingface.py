"""The huggingface engine against the contract suite."""

from functools import cache
from pathlib import Path

import pytest

from kvmesh.engines.engine import Engine
from kvmesh.engines.huggingface_options import HuggingFaceOptions
from kvmesh.testing.kv_engine_contract import KvEngineContract
from kvmesh.testing.tiny_model import write_tiny_model

pytest.importorskip("torch", reason="torch is not installed: make install-hf")
pytest.importorskip("transformers", reason="transformers is not installed: make install-hf")


@cache
def load_tiny(folder: Path) -> object:
    from kvmesh.engines.huggingface_model import load_model

    return load_model(write_tiny_model(folder), dtype="float64", device="cpu", threads=1)


class TestHuggingFaceEngine(KvEngineContract):
    folder: Path

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        request.cls.folder = tmp_path_factory.mktemp("tiny")

    def make_engine(self, *, total_blocks: int = 64, block_size: int = 4, max_sequences: int = 4) -> Engine:
        from kvmesh.engines.huggingface import HuggingFaceEngine
        from kvmesh.engines.huggingface_model import HuggingFaceModel

        options = HuggingFaceOptions(
            total_blocks=total_blocks, block_size=block_size, max_sequences=max_sequences, max_batched_tokens=16,
            dtype="float64",
        )  # fmt: skip
        model = load_tiny(self.folder)
        assert isinstance(model, HuggingFaceModel)
        return HuggingFaceEngine(model, options)
