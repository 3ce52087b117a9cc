"""Checksums of handed-over blocks: what arrives with other bytes is dropped, and computed where it is needed."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh import telemetry
from kvmesh.engines.numpy_llama import NumpyLlamaEngine
from kvmesh.engines.numpy_llama_options import NumpyLlamaOptions
from kvmesh.engines.numpy_llama_weights import LlamaWeights, load_weights
from kvmesh.testing.remote_prefills import decisions
from kvmesh.testing.tiny_model import write_tiny_model
from kvmesh.testing.worker_group import WorkerGroup, request, worker_group
from kvmesh.transports.memory import MemoryTransport

PROMPT = tuple(range(5, 75))
OPTIONS = NumpyLlamaOptions(total_blocks=64, block_size=16, dtype="float64")


class BitFlippingTransport(MemoryTransport):
    """Changes the lowest bit of one value of the last block that arrives."""

    async def pull(
        self,
        agent_name: str,
        *,
        source_block_ids: Sequence[int],
        target: npt.NDArray[np.uint8],
        target_block_ids: Sequence[int],
    ) -> int:
        moved = await super().pull(
            agent_name, source_block_ids=source_block_ids, target=target, target_block_ids=target_block_ids
        )
        target[target_block_ids[-1], 0] ^= 1
        return moved


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> LlamaWeights:
    return load_weights(write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"), dtype="float64")


def altered() -> float:
    return float(telemetry.KV_BLOCKS_ALTERED._value.get())


@pytest.mark.parametrize("checksums", [True, False])
async def test_a_flipped_bit_is_found_by_checksums_alone(
    group: WorkerGroup, weights: LlamaWeights, checksums: bool
) -> None:
    await group.add_queue()
    await group.add_prefill(NumpyLlamaEngine(weights, OPTIONS), checksums=checksums)
    decode = await group.add_decode(NumpyLlamaEngine(weights, OPTIONS), transport=BitFlippingTransport(group.network))
    before = altered()

    answer = await group.generate(decode, request("r", tokens=PROMPT, max_tokens=8))

    if checksums:
        assert decisions(answer) == [(True, "remote"), (False, "fallback_kv_transfer_failed")]
        assert altered() == before + 1
    else:
        assert decisions(answer) == [(True, "remote")]
    await group.wait_idle()


async def test_whole_blocks_arrive_with_their_checksums_and_give_the_local_tokens(
    group: WorkerGroup, weights: LlamaWeights
) -> None:
    await group.add_queue()
    await group.add_prefill(NumpyLlamaEngine(weights, OPTIONS), checksums=True)
    decode = await group.add_decode(NumpyLlamaEngine(weights, OPTIONS), checksums=True)
    longer = (*PROMPT, *range(100, 170))
    async with worker_group() as alone:
        local = await alone.add_decode(NumpyLlamaEngine(weights, OPTIONS))
        expected = [
            (await alone.generate(local, request(name, tokens=tokens, max_tokens=8))).token_ids
            for name, tokens in (("a", PROMPT), ("b", longer))
        ]

    first = await group.generate(decode, request("first", tokens=PROMPT, max_tokens=8))
    second = await group.generate(decode, request("second", tokens=longer, max_tokens=8))

    assert [decisions(first), decisions(second)] == [[(True, "remote")], [(True, "remote")]]
    assert [first.token_ids, second.token_ids] == expected
    assert second.usage.remote_prefill_tokens < first.usage.remote_prefill_tokens + len(longer) - len(PROMPT) + 1
    await group.wait_idle()
