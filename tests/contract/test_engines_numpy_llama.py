"""The numpy_llama engine against the contract suite, in both of its dtypes."""

from functools import cache
from pathlib import Path

import pytest

from kvmesh.engines.numpy_llama import NumpyLlamaEngine
from kvmesh.engines.numpy_llama_options import NumpyLlamaOptions
from kvmesh.engines.numpy_llama_weights import LlamaWeights, load_weights
from kvmesh.testing.kv_engine_contract import KvEngineContract
from kvmesh.testing.tiny_model import write_tiny_model


@cache
def tiny_weights(folder: Path, dtype: str) -> LlamaWeights:
    return load_weights(folder, dtype=dtype)


class NumpyLlamaContract(KvEngineContract):
    dtype = "float32"
    folder: Path

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        request.cls.folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))

    def make_engine(self, *, total_blocks: int = 64, block_size: int = 4, max_sequences: int = 4) -> NumpyLlamaEngine:
        options = NumpyLlamaOptions(
            total_blocks=total_blocks, block_size=block_size, max_sequences=max_sequences, max_batched_tokens=16,
            dtype=self.dtype,
        )  # fmt: skip
        return NumpyLlamaEngine(tiny_weights(self.folder, self.dtype), options)


class TestNumpyLlamaEngine(NumpyLlamaContract):
    pass


class TestNumpyLlamaEngineInFloat64(NumpyLlamaContract):
    dtype = "float64"
