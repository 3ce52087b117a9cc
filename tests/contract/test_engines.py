"""Every Engine against the contract suite."""

from kvmesh.engines.echo import EchoEngine, EchoOptions
from kvmesh.engines.simulated import SimulatedEngine
from kvmesh.engines.simulated_options import SimulatedOptions
from kvmesh.testing.engine_contract import EngineContract
from kvmesh.testing.kv_engine_contract import KvEngineContract


class TestEchoEngine(EngineContract):
    def make_engine(self, *, total_blocks: int = 64, block_size: int = 4, max_sequences: int = 4) -> EchoEngine:
        return EchoEngine(node_name="NODE1", options=EchoOptions(max_sequences=max_sequences))


class TestSimulatedEngine(KvEngineContract):
    def make_engine(self, *, total_blocks: int = 64, block_size: int = 4, max_sequences: int = 4) -> SimulatedEngine:
        return SimulatedEngine(
            SimulatedOptions(
                total_blocks=total_blocks, block_size=block_size, max_sequences=max_sequences,
                max_batched_tokens=16, vocab_size=1_000, speedup=0.0,
            )
        )  # fmt: skip
