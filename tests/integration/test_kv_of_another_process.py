"""A prompt computed in one process and continued in another: the tokens of one engine, by every transport."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.ids import SequenceHash
from kvmesh.engines.engine import Engine, Sampling
from kvmesh.engines.numpy_llama import NumpyLlamaEngine
from kvmesh.engines.numpy_llama_options import NumpyLlamaOptions
from kvmesh.engines.numpy_llama_weights import load_weights
from kvmesh.testing.engine_contract import Answer, attempt, run_all, token_request
from kvmesh.testing.tiny_model import write_tiny_model
from kvmesh.testing.transport_contract import GENEROUS_S
from kvmesh.transports import nixl_library
from kvmesh.transports.nixl import NixlTransport
from kvmesh.transports.shared_memory import SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport
from kvmesh.transports.transport import Transport

BLOCK_SIZE = 16
BLOCKS = 18
"""Full blocks of a prompt of 300 tokens."""
PROMPT = np.random.default_rng(11).integers(5, 512, 300).astype(np.uint32)
OUTPUT_TOKENS = 64
GREEDY = Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)

SOURCE = """
import asyncio, json, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[4])
from test_kv_of_another_process import BLOCKS, HASHES, PROMPT, make_engine, make_transport
from kvmesh.engines.engine import Sampling
from kvmesh.testing.engine_contract import run_all, token_request

async def main():
    transport = make_transport(sys.argv[1], Path(sys.argv[2]))
    engine = make_engine(Path(sys.argv[3]), transport)
    one = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
    engine.submit(token_request(engine.info, 1, PROMPT, sampling=one))
    run_all(engine)
    pin = engine.pin_prefix(HASHES[:BLOCKS])
    name = await transport.serve("node/prefill/0@1", engine.kv_memory())
    print(json.dumps([name, list(map(int, pin.block_ids))]), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await transport.aclose()

asyncio.run(main())
"""

LOCAL = local_block_hashes(PROMPT, BLOCK_SIZE)[:BLOCKS]
HASHES: tuple[SequenceHash, ...] = tuple(sequence_hashes(LOCAL))

needs_nixl = pytest.mark.skipif(not nixl_library.is_installed(), reason=f"needs NIXL: {nixl_library.INSTALL}")


def make_transport(kind: str, directory: Path) -> Transport:
    match kind:
        case "tcp":
            return TcpTransport()
        case "nixl":
            return NixlTransport()
        case _:
            return SharedMemoryTransport(directory)


def make_engine(folder: Path, transport: Transport | None = None) -> Engine:
    options = NumpyLlamaOptions(total_blocks=64, block_size=BLOCK_SIZE, dtype="float64")

    def allocate(blocks: int, block_bytes: int) -> npt.NDArray[np.uint8]:
        memory = transport.allocate(blocks, block_bytes) if transport is not None else None
        return np.zeros((blocks, block_bytes), dtype=np.uint8) if memory is None else memory

    return NumpyLlamaEngine(load_weights(folder, dtype="float64"), options, allocate=allocate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Answer:
    """What one engine answers that has all of it to itself."""
    return continued(make_engine(folder))


@asynccontextmanager
async def prefilled(kind: str, directory: Path, folder: Path) -> AsyncIterator[tuple[str, list[int]]]:
    """Run a process that has computed the prompt; yields the public name of its pool and the prompt's blocks there."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SOURCE, kind, str(directory), str(folder), str(Path(__file__).parent),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        async with asyncio.timeout(GENEROUS_S):
            name, blocks = json.loads(await child.stdout.readline())
        yield name, blocks
    finally:
        child.stdin.close()
        async with asyncio.timeout(GENEROUS_S):
            await child.wait()


def continued(engine: Engine) -> Answer:
    engine.submit(token_request(engine.info, 1, PROMPT, sampling=GREEDY))
    return run_all(engine).answers[attempt(1)]


async def fetch(engine: Engine, transport: Transport, name: str, blocks: list[int], *, first_block: int) -> list[int]:
    """Pull what follows `first_block` blocks that the engine has, and return where it lies."""
    wanted = engine.begin_import(HASHES, first_block=first_block)
    memory = engine.kv_memory()
    assert memory is not None
    async with asyncio.timeout(GENEROUS_S):
        await transport.pull(
            name, source_block_ids=blocks[first_block:], target=memory, target_block_ids=wanted.block_ids
        )
    engine.commit_import(wanted.import_id, block_hashes=HASHES, local_hashes=tuple(map(int, LOCAL)))
    return list(wanted.block_ids)


@pytest.mark.parametrize("kind", ["shared_memory", "tcp", pytest.param("nixl", marks=needs_nixl)])
async def test_decode_goes_on_from_the_kv_of_another_process_as_from_its_own(
    kind: str, folder: Path, tmp_path: Path, alone: Answer
) -> None:
    transport = make_transport(kind, tmp_path)
    whole, rest, spoiled = (make_engine(folder, transport if number == 0 else None) for number in range(3))
    held = 6
    rest.submit(token_request(rest.info, 9, PROMPT[: held * BLOCK_SIZE + 1], sampling=Sampling(max_tokens=1)))
    run_all(rest)
    async with prefilled(kind, tmp_path, folder) as (name, blocks):
        await fetch(whole, transport, name, blocks, first_block=0)
        await fetch(rest, transport, name, blocks, first_block=held)
        places = await fetch(spoiled, transport, name, blocks, first_block=0)
    await transport.aclose()
    memory = spoiled.kv_memory()
    assert memory is not None
    memory[places[3]] = 0

    answers = [continued(engine) for engine in (whole, rest, spoiled)]

    assert [answer.prompt_output.cached_tokens for answer in answers] == [BLOCKS * BLOCK_SIZE] * 3
    assert alone.prompt_output.cached_tokens == 0
    assert len(alone.token_ids) == OUTPUT_TOKENS
    assert answers[0].token_ids == alone.token_ids
    assert answers[1].token_ids == alone.token_ids
    assert answers[2].token_ids != alone.token_ids
