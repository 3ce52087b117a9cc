"""A mesh without a queue: decode workers ask prefill workers themselves."""

from pathlib import Path

from kvmesh.testing.mesh import generate, open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.testing.tiny_model import write_tiny_model
from kvmesh.v1 import frontend_pb2, generation_pb2

GREEDY = generation_pb2.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
PROMPT = "Prefill and decode apart, and no queue between them: " * 4


async def test_prefills_are_remote_and_the_tokens_are_those_of_local_ones(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    options = {"dtype": "float64"}
    async with (
        running_mesh(
            mesh__decode=1, mesh__prefill=0, engine__name="numpy_llama", engine__model=folder, engine__options=options
        ) as alone,
        open_frontend(alone) as frontend,
    ):
        expected = await generate(frontend, PROMPT, sampling=GREEDY)

    async with (
        running_mesh(
            mesh__decode=1, mesh__prefill=2, engine__name="numpy_llama", engine__model=folder, engine__options=options,
            remote_prefill__mode="direct", remote_prefill__min_uncached_tokens=16, remote_prefill__checksums=True,
        ) as mesh,
        open_frontend(mesh) as frontend,
    ):  # fmt: skip
        baseline = await read_baseline(mesh)
        answer = await generate(frontend, PROMPT, sampling=GREEDY)
        topology = (await frontend.GetTopology(frontend_pb2.GetTopologyRequest())).topology
        await wait_for_baseline(mesh, baseline)

    assert (answer.started.prefill.remote, answer.started.prefill.reason) == (True, "remote_direct")
    assert answer.token_ids == expected.token_ids
    assert answer.finished is not None
    assert answer.finished.usage.kv_bytes_moved > 0
    assert not topology.HasField("queue")
