"""The pulling half of a worker over NIXL: one agent, its connections and its registered targets.

Everything here runs on the transport's one thread; who may use a lane, and when it ends, is told in `nixl_pulls`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvmesh.transports.blocks import Pool, failed
from kvmesh.transports.nixl_agent import DescriptorList, NixlAgent, Region, Transfer
from kvmesh.transports.nixl_name import TOKEN_BYTES, NixlName

PIECE_BYTES = 16 << 20
"""Read in one go: a pull that is given up ends after at most one more, and pulls take turns."""
_SPIN_S = 100e-6
"""Most reads within one host are done when they are looked at for the first or second time."""
_MAX_LINKS = 256
_MAX_TARGETS = 4
"""A worker has one pool; registered memory is kept, so what is pulled into only once must go."""
_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one pull is to read; checked."""

    name: NixlName
    source_block_ids: Sequence[int]
    target: Pool
    target_block_ids: Sequence[int]


@dataclass(slots=True)
class Move:
    """What one pull has in flight."""

    slot: int
    """Where its copy of the source's token goes."""
    transfer: Transfer | None = None
    is_writing: bool = False
    """Something may be written for it. An error is no end of that: other parts of the transfer may go on."""
    steps: Iterator[None] = field(default_factory=lambda: iter(()))


@dataclass(frozen=True, slots=True)
class _Link:
    peer: str
    blocks: DescriptorList
    token: DescriptorList


@dataclass(frozen=True, slots=True)
class _Target:
    memory: Pool
    """Kept: other memory at this address would be taken for it."""
    registered: int
    blocks: DescriptorList


@dataclass(slots=True)
class _Open:
    """What a lane has from its first use on."""

    agent: NixlAgent
    tokens: Pool
    token_places: DescriptorList
    links: dict[bytes, _Link] = field(default_factory=dict)
    """By token, the one that was used last at the end."""
    targets: dict[tuple[int, tuple[int, ...]], _Target] = field(default_factory=dict)


class NixlLane:
    """One agent that pulls; made at the first use."""

    def __init__(self, name: str, *, devices: str | None) -> None:
        """Nothing is opened yet."""
        self._name = name
        self._devices = devices
        self._opened: _Open | None = None
        self.free_slots = list(range(_TOKENS))

    def begin(self, move: Move, wanted: Wanted, *, is_alone: bool) -> bool:
        """Begin a pull, and `advance` it; earlier targets may go if it `is_alone` on this lane."""
        move.steps = self._read(move, wanted, is_alone=is_alone)
        return self.advance(move)

    def advance(self, move: Move) -> bool:
        """Go on with a pull until it is done, a piece further, or waits for the source; tell whether it is done.

        Raises: TryElsewhereError(KV_TRANSFER_FAILED).
        """
        try:
            next(move.steps)
        except StopIteration:
            return True
        return False

    def settle(self, move: Move) -> None:
        """Look whether what is in flight is done, without beginning more. Raises: as `advance`."""
        if move.transfer is not None and self._open().agent.is_done(move.transfer):
            move.transfer, move.is_writing = None, False

    def forget(self, name: NixlName) -> None:
        """End the connection to a source."""
        if self._opened is not None and name.token in self._opened.links:
            self._drop(self._opened, name.token)

    def close(self) -> None:
        """Destroy the agent: nothing that was in flight is written any more. Idempotent."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.agent.close()

    def _read(self, move: Move, wanted: Wanted, *, is_alone: bool) -> Iterator[None]:
        """Connect, read the blocks, and then the token: the source still serves, so what was read is what it serves."""
        opened, name = self._open(), wanted.name
        if name.token not in opened.links:
            self._connect(opened, name)
            yield from self._read_token(opened, move, name)
        own = self._target(opened, wanted.target, is_alone=is_alone)
        piece = max(PIECE_BYTES // name.block_bytes, 1)
        for at in range(0, len(wanted.source_block_ids), piece):
            if at:
                yield
            link = _link(opened, name)
            move.is_writing = True
            move.transfer = opened.agent.begin(
                "READ",
                own=own.blocks,
                own_indices=wanted.target_block_ids[at : at + piece],
                theirs=link.blocks,
                their_indices=wanted.source_block_ids[at : at + piece],
            )
            yield from self._until_done(opened, move)
        yield from self._read_token(opened, move, name)

    def _read_token(self, opened: _Open, move: Move, name: NixlName) -> Iterator[None]:
        opened.tokens[move.slot] = 0
        link = _link(opened, name)
        move.is_writing = True
        move.transfer = opened.agent.begin(
            "READ", own=opened.token_places, own_indices=[move.slot], theirs=link.token, their_indices=[0]
        )
        yield from self._until_done(opened, move)
        if opened.tokens[move.slot].tobytes() != name.token:
            raise failed(f"{name.agent_name} serves no more")

    def _until_done(self, opened: _Open, move: Move) -> Iterator[None]:
        until = time.perf_counter() + _SPIN_S
        while move.transfer is not None:
            if opened.agent.is_done(move.transfer):
                move.transfer, move.is_writing = None, False
            elif time.perf_counter() > until:
                yield
                until = time.perf_counter() + _SPIN_S

    def _open(self) -> _Open:
        if self._opened is None:
            agent = NixlAgent(self._name, devices=self._devices)
            tokens = np.zeros((_TOKENS, TOKEN_BYTES), dtype=np.uint8)
            region = Region(tokens.ctypes.data, tokens.nbytes)
            agent.register(region)
            self._opened = _Open(agent, tokens, agent.prepare(region.places(_TOKENS)))
        return self._opened

    def _connect(self, opened: _Open, name: NixlName) -> None:
        """Begin to connect to a source; a tenth of a second until the first read is done."""
        if len(opened.links) >= _MAX_LINKS:
            self._drop(opened, next(iter(opened.links)))
        agent = opened.agent
        peer = agent.add_peer(name.metadata)
        try:
            blocks = agent.prepare(Region(name.address, name.blocks * name.block_bytes).places(name.blocks), peer=peer)
            token = agent.prepare(Region(name.token_address, TOKEN_BYTES).places(1), peer=peer)
        except BaseException:
            agent.remove_peer(peer)
            raise
        opened.links[name.token] = _Link(peer, blocks, token)

    def _target(self, opened: _Open, memory: Pool, *, is_alone: bool) -> _Target:
        key = (memory.ctypes.data, memory.shape)
        if key not in opened.targets:
            while is_alone and len(opened.targets) >= _MAX_TARGETS:
                oldest = opened.targets.pop(next(iter(opened.targets)))
                opened.agent.unprepare(oldest.blocks)
                opened.agent.deregister(oldest.registered)
            region = Region(memory.ctypes.data, memory.nbytes)
            registered = opened.agent.register(region)
            opened.targets[key] = _Target(memory, registered, opened.agent.prepare(region.places(memory.shape[0])))
        return opened.targets[key]

    def _drop(self, opened: _Open, token: bytes) -> None:
        link = opened.links.pop(token)
        opened.agent.unprepare(link.blocks)
        opened.agent.unprepare(link.token)
        opened.agent.remove_peer(link.peer)


def _link(opened: _Open, name: NixlName) -> _Link:
    """Return the connection to a source, the one that was used last from now on."""
    link = opened.links.pop(name.token, None)
    if link is None:
        raise failed(f"the connection to {name.agent_name} has ended")
    opened.links[name.token] = link
    return link
