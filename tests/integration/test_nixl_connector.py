"""The connector: two of them in one process, and one whose other side is killed or stands still."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh.core.errors import (
    ConflictError,
    FixRequestError,
    MeshError,
    NotKnownError,
    OutOfTimeError,
    Reason,
    TryElsewhereError,
)
from kvmesh.testing.transport_contract import GENEROUS_S
from kvmesh.transports import nixl_library
from kvmesh.transports.connector import BlockTransfer, NixlConnector, TransferStatus
from kvmesh.transports.nixl_agent import NixlAgent, Region

pytestmark = pytest.mark.skipif(not nixl_library.is_installed(), reason=f"needs NIXL: {nixl_library.INSTALL}")

EXAMPLE = Path(__file__).parents[2] / "examples" / "nixl_connector"
LAYERS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM = 3, 24, 4, 2, 8
SHAPE = (BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM)
LAYER_BLOCK_BYTES = BLOCK_SIZE * HEADS * HEAD_DIM * 4

Caches = list[npt.NDArray[np.float32]]


def make_caches(first: int) -> Caches:
    """Return caches in which every block of every layer holds a number of its own, from `first` on."""
    numbers = first + np.arange(LAYERS * BLOCKS, dtype=np.float32).reshape(LAYERS, BLOCKS)
    return [np.tile(layer.reshape(BLOCKS, 1, 1, 1), (1, *SHAPE[1:])) for layer in numbers]


def copied(caches: Caches) -> Caches:
    return [layer.copy() for layer in caches]


class Pair:
    """A prefill and a decode engine, connected both ways."""

    def __init__(self) -> None:
        self.prefill, self.decode = NixlConnector("prefill-0"), NixlConnector("decode-0")
        self.prefill_caches, self.decode_caches = make_caches(1000), make_caches(0)
        self.prefill.register_kv_caches(self.prefill_caches)
        self.decode.register_kv_caches(self.decode_caches)
        self.prefill.add_remote_agent("decode-0", self.decode.get_agent_metadata())
        self.decode.add_remote_agent("prefill-0", self.prefill.get_agent_metadata())
        self.heard: list[tuple[str, bytes]] = []

    def finish(self, transfer: BlockTransfer, *, by: NixlConnector) -> TransferStatus:
        """Look at a transfer until it ends, while the other side does its part."""
        other = self.decode if by is self.prefill else self.prefill
        until = time.monotonic() + GENEROUS_S
        while by.status(transfer) is TransferStatus.MOVING and time.monotonic() < until:
            self.heard += other.notifications()
        return transfer.status

    def hear(self, listener: NixlConnector) -> tuple[str, bytes]:
        return self.heard.pop(0) if self.heard else listener.wait_for_notification(timeout_s=GENEROUS_S)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.prefill.close()
    pair.decode.close()


def test_blocks_are_written_in_every_layer_with_a_notification(pair: Pair) -> None:
    before = copied(pair.decode_caches)

    transfer = pair.prefill.write_blocks("decode-0", [0, 3], [12, 16], b"kv_transfer")
    status = pair.finish(transfer, by=pair.prefill)

    assert status is TransferStatus.DONE
    assert transfer.size_bytes == LAYERS * 2 * LAYER_BLOCK_BYTES
    assert pair.hear(pair.decode) == ("prefill-0", b"kv_transfer")
    others = sorted(set(range(BLOCKS)) - {12, 16})
    for layer, was, source in zip(pair.decode_caches, before, pair.prefill_caches, strict=True):
        assert (layer[[12, 16]] == source[[0, 3]]).all()
        assert (layer[others] == was[others]).all()


def test_blocks_are_read_and_their_owner_is_told(pair: Pair) -> None:
    before = copied(pair.prefill_caches)

    transfer = pair.decode.read_blocks("prefill-0", [5, 6, 7], [23, 0, 9], b"read")
    status = pair.finish(transfer, by=pair.decode)

    assert status is TransferStatus.DONE
    assert pair.hear(pair.prefill) == ("decode-0", b"read")
    for layer, source, was in zip(pair.decode_caches, pair.prefill_caches, before, strict=True):
        assert (layer[[5, 6, 7]] == source[[23, 0, 9]]).all()
        assert (source == was).all()
    assert not pair.decode.quarantined_blocks


def test_transfers_without_a_notification_say_nothing(pair: Pair) -> None:
    pair.finish(pair.prefill.write_blocks("decode-0", [1], [2]), by=pair.prefill)
    pair.finish(pair.prefill.write_blocks("decode-0", [1], [3], b"second"), by=pair.prefill)

    assert pair.hear(pair.decode) == ("prefill-0", b"second")
    assert pair.decode.notifications() == []


@pytest.mark.parametrize(("local", "remote"), [([0], [BLOCKS]), ([BLOCKS], [0]), ([-1], [0]), ([0, 1], [0]), ([], [])])
def test_blocks_that_are_none_or_do_not_pair_are_refused(pair: Pair, local: list[int], remote: list[int]) -> None:
    before = copied(pair.decode_caches)

    with pytest.raises(FixRequestError) as caught:
        pair.prefill.write_blocks("decode-0", local, remote)

    assert caught.value.reason is Reason.INVALID_FIELD
    assert all((now == was).all() for now, was in zip(pair.decode_caches, before, strict=True))


def test_engine_that_was_not_added_or_was_removed_is_not_known(pair: Pair) -> None:
    pair.prefill.remove_remote_agent("decode-0")

    for engine_id in ("decode-0", "decode-1"):
        with pytest.raises(NotKnownError):
            pair.prefill.write_blocks(engine_id, [0], [0])


def test_engine_that_comes_back_replaces_the_one_before(pair: Pair) -> None:
    pair.decode.close()
    with NixlConnector("decode-0") as again:
        caches = make_caches(0)
        again.register_kv_caches(caches)
        pair.prefill.add_remote_agent("decode-0", again.get_agent_metadata())
        pair.decode = again

        status = pair.finish(pair.prefill.write_blocks("decode-0", [0], [1]), by=pair.prefill)

    assert status is TransferStatus.DONE
    assert (caches[0][1] == pair.prefill_caches[0][0]).all()


@pytest.mark.parametrize(
    "others",
    [
        [np.zeros(SHAPE, dtype=np.float32)] * (LAYERS - 1),
        [np.zeros(SHAPE, dtype=np.float16)] * LAYERS,
        [np.zeros((BLOCKS, BLOCK_SIZE, HEADS * 2, HEAD_DIM // 2), dtype=np.float32)] * LAYERS,
    ],
)
def test_engine_with_other_caches_is_refused(pair: Pair, others: list[npt.NDArray[np.float32]]) -> None:
    with NixlConnector("decode-1") as stranger:
        stranger.register_kv_caches([other.copy() for other in others])

        with pytest.raises(ConflictError) as caught:
            pair.prefill.add_remote_agent("decode-1", stranger.get_agent_metadata())

    assert caught.value.reason is Reason.LAYOUT_MISMATCH


@pytest.mark.parametrize("metadata", [b"", b"kvmC", b"x" * 400, b"kvmC\1\0\0\0\4\0\0\0null"])
def test_bytes_that_are_no_metadata_are_refused(pair: Pair, metadata: bytes) -> None:
    with pytest.raises(FixRequestError):
        pair.prefill.add_remote_agent("decode-1", metadata)


def test_metadata_that_was_cut_short_is_refused(pair: Pair) -> None:
    with pytest.raises(MeshError):
        pair.prefill.add_remote_agent("decode-1", pair.decode.get_agent_metadata()[:-100])


def read_only() -> npt.NDArray[np.float32]:
    array = np.zeros(SHAPE, dtype=np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "caches",
    [
        [],
        [None],
        [np.zeros(SHAPE[:3])],
        [np.zeros((0, 4, 2, 8))],
        [np.zeros(SHAPE)[:, ::2]],
        [np.zeros(SHAPE), np.zeros(SHAPE, dtype=np.int8)],
        [read_only()],
    ],
)
def test_caches_that_cannot_be_moved_are_refused(caches: list[object]) -> None:
    with NixlConnector("e") as connector:
        with pytest.raises(FixRequestError):
            connector.register_kv_caches(caches)
        with pytest.raises(FixRequestError, match="register the KV caches first"):
            connector.get_agent_metadata()

        connector.register_kv_caches(make_caches(0))


def test_caches_are_registered_once(pair: Pair) -> None:
    with pytest.raises(FixRequestError):
        pair.prefill.register_kv_caches(make_caches(0))


def test_read_that_nobody_answers_is_abandoned_and_its_blocks_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    pair = Pair()

    transfer = pair.decode.read_blocks("prefill-0", [4, 2], [0, 1])
    with pytest.raises(OutOfTimeError) as caught:
        pair.decode.wait(transfer, timeout_s=0.2)

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
    assert pair.decode.status(transfer) is TransferStatus.ABANDONED
    assert pair.decode.quarantined_blocks == {2, 4}
    pair.decode.close()
    assert not pair.decode.quarantined_blocks
    pair.prefill.close()


def test_closed_connector_says_so(pair: Pair) -> None:
    pair.prefill.close()
    pair.prefill.close()

    with pytest.raises(TryElsewhereError, match="closed"):
        pair.prefill.notifications()
    with pytest.raises(TryElsewhereError, match="closed"):
        pair.prefill.get_agent_metadata()


def test_wait_for_a_notification_is_bounded(pair: Pair) -> None:
    with pytest.raises(OutOfTimeError):
        pair.decode.wait_for_notification(timeout_s=0.05)


LISTENER = f"""
import numpy as np
from kvmesh.transports.connector import NixlConnector

connector = NixlConnector("decode-0")
connector.register_kv_caches([np.zeros({SHAPE}, dtype=np.float32) for _ in range({LAYERS})])
print(connector.get_agent_metadata().hex(), flush=True)
while True:
    print(connector.wait_for_notification(timeout_s={GENEROUS_S}), flush=True)
"""


def test_engine_that_was_killed_fails_transfers_and_comes_back_under_its_name() -> None:
    with NixlConnector("prefill-0") as connector:
        connector.register_kv_caches(make_caches(1000))
        for _ in range(2):
            with subprocess.Popen([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout is not None
                connector.add_remote_agent("decode-0", bytes.fromhex(child.stdout.readline()))
                connector.wait(connector.write_blocks("decode-0", [0], [1], b"first"), timeout_s=GENEROUS_S)
                assert child.stdout.readline() == "('prefill-0', b'first')\n"
                child.kill()
            with pytest.raises(MeshError) as caught:
                connector.wait(connector.write_blocks("decode-0", [0], [1], b"second"), timeout_s=GENEROUS_S)

            assert caught.value.reason is Reason.KV_TRANSFER_FAILED


def test_transfer_that_failed_is_never_taken_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    agents = [NixlAgent(name, devices="lo") for name in ("reader", "source")]
    pools = [np.zeros((4, 1 << 20), dtype=np.uint8) for _ in agents]
    regions = [Region(pool.ctypes.data, pool.nbytes) for pool in pools]
    for agent, region in zip(agents, regions, strict=True):
        agent.register(region)
    reader, source = agents
    peer = reader.add_peer(source.metadata())
    own, theirs = reader.prepare(regions[0].places(4)), reader.prepare(regions[1].places(4), peer=peer)
    transfer = reader.begin("READ", own=own, own_indices=range(4), theirs=theirs, their_indices=range(4))
    source.close()

    def wait() -> None:
        until = time.monotonic() + GENEROUS_S
        while not reader.is_done(transfer) and time.monotonic() < until:
            pass

    with pytest.raises(TryElsewhereError):
        wait()
    with pytest.raises(TryElsewhereError, match="had failed"):
        reader.is_done(transfer)

    reader.close()


def test_the_example_moves_blocks_between_two_processes() -> None:
    ended = subprocess.run(
        [sys.executable, "nixl_connector.py"], cwd=EXAMPLE, capture_output=True, text=True, timeout=50, check=False
    )

    assert ended.returncode == 0, ended.stderr
    promised = (EXAMPLE / "README.md").read_text().split("answers\n```\n")[1].split("```")[0]
    assert ended.stdout == promised
