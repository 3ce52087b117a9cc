"""The tree of blocks under `PrefixIndex`: which bits hold which block, a radix tree whose nodes are found by hash.

A run is a stretch of one sequence that the same bits hold. Laws, checked by `check_integrity`:
    - every block lies in exactly one run, of 1 to `RUN_BLOCKS` blocks, so that splitting and joining are bounded;
    - a bit that is not being wiped is in a run only if it is in the run above (closed prefix);
    - a run without bits has runs below it: it goes when they do;
    - runs at and past the wipe's cursor have none of the bits being wiped;
    - a run knows the keys (`core/prefix_keys.py`) of all its blocks or of none, the latter also below one that does;
    - of those keys `by_key` has the first of a run and every one at a multiple of `ANCHOR_BLOCKS` in its sequence.

Compared with a textbook radix tree, children are found through the dictionaries of the whole tree, so a node costs no
map of its own, and a block costs an entry of `by_hash`, two words in its run, and a small part of an entry of `by_key`.
"""

from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from kvmesh.core.block_run import Lost, Path, Run, keys_below, link, lost_from, named_positions, unlink
from kvmesh.core.ids import SequenceHash

RUN_BLOCKS = 128
"""Most blocks in a run: the cost of a split against the bytes per block."""
SHORT = 2**60 - 1
"""The bits of a hash that are looked up: a Python integer of 60 bits takes a third less memory than one of 64. Of two
blocks that share them the second is refused as a conflict, as if they shared all 64."""


@dataclass(slots=True)
class RunTree:
    """Blocks, the bits that hold them, and the wiping of bits that are given up; all of it for reading only."""

    root: Run = field(default_factory=lambda: Run(array("Q"), array("Q"), -1, None))
    by_hash: dict[int, int] = field(default_factory=dict)
    """Number of the run by the `SHORT` of every block's hash. It holds integers only, one per run, and so the garbage
    collector never looks into it: with objects in it, one collection of 10^7 blocks stopped everything for a second.
    """
    by_key: dict[int, Run] = field(default_factory=dict)
    """The first key of every run, and those at multiples of `ANCHOR_BLOCKS`."""
    order: list[Run] = field(default_factory=list)
    """All runs but the root."""
    pairs: int = 0
    """(bit, block) pairs held, bits being wiped included."""
    unkeyed_runs: int = 0
    """Runs that know no keys: while there is one, only sequence hashes find everything."""
    wiping: int = 0
    """Bits being wiped."""
    _cursor: int = 0
    _numbered: list[Run | None] = field(default_factory=list)
    _free_numbers: list[int] = field(default_factory=list)

    def locate(self, block: SequenceHash) -> tuple[Run, int] | None:
        """Return the run of a block and its position there, or None; O(1) for the last block of a run."""
        run = self.candidate(block)
        if run is None:
            return None
        if run.hashes[-1] == block:
            return run, len(run.hashes) - 1
        try:
            return run, run.hashes.index(block)
        except ValueError:  # another block, whose hash differs in the bits beyond
            return None

    def candidate(self, block: int) -> Run | None:
        """Return the one run that may have a block of this hash: its short hash is there."""
        number = self.by_hash.get(block & SHORT)
        return None if number is None else self._numbered[number]

    def holds(self, block: SequenceHash, bit: int) -> bool:
        """True if `bit` holds the block."""
        run = self.candidate(block)
        return run is not None and bool(run.mask & bit) and (run.hashes[-1] == block or block in run.hashes)

    def has_elsewhere(self, block: SequenceHash, parent: SequenceHash) -> bool:
        """True if the block is in the tree, and not below `parent`."""
        if (block & SHORT) not in self.by_hash:
            return False
        located = self.locate(block)
        if located is None:
            return True
        run, at = located
        return (run.hashes[at - 1] if at else run.above) != parent

    def follow(self, parent: SequenceHash | None, blocks: Sequence[SequenceHash]) -> Path | None:
        """Find where `blocks` below `parent`, a block of the tree or None, lead; None if one has another parent."""
        located = (self.root, -1) if parent is None else self.locate(parent)
        assert located is not None
        run = start = located[0]
        end = located[1] + 1
        in_start = 0
        entered: list[Run] = []
        at = 0
        while at < len(blocks):
            if end < len(run.hashes):
                if run.hashes[end] != blocks[at]:
                    break
                end += 1
                in_start += not entered
            else:
                below = self.candidate(blocks[at])
                if below is None:
                    break
                if below.parent is not run or below.hashes[0] != blocks[at]:
                    return None
                entered.append(below)
                run, end = below, 1
            at += 1
        rest = blocks[at:]
        short = self._short_of_new(rest)
        return None if short is None else Path(start, in_start, entered, end, rest, short)

    def extend(
        self, parent: SequenceHash, blocks: Sequence[SequenceHash], bit: int, local_hashes: Sequence[int] | None
    ) -> bool:
        """Store new blocks below a run that ends in `parent`, if only `bit` holds it and nothing else has to change.

        That is what most stores come to; False: nothing is changed, `follow` and `hold` do it.
        """
        run = self.candidate(parent)
        if run is None or run.mask != bit or run.first_child is not None or run.hashes[-1] != parent:
            return False
        short = self._short_of_new(blocks)
        if short is None:
            return False
        keys = keys_below(run, len(run.hashes), local_hashes or ())
        self._append(run, array("Q", blocks), short, keys, bit)
        return True

    def hold(self, path: Path, bit: int, local_hashes: Sequence[int] | None) -> None:
        """Give `bit` every block of a path just followed; it must hold the path's start.

        `local_hashes`: those of the path's blocks, u64, or None.
        """
        last = path.last
        keys = keys_below(last, path.end, local_hashes[-len(path.rest) :] if local_hashes and path.rest else ())
        below: Run | None = None
        if path.end < len(last.hashes) and (path.rest or not last.mask & bit):
            last, below = self._split(last, path.end)
        for run in [*path.entered[:-1], last] if path.entered else ():
            if not run.mask & bit:
                run.mask |= bit
                self.pairs += len(run.hashes)
        self._append(last, array("Q", path.rest), path.short_rest, keys, bit)
        if below is not None:
            self._prune(below)
        for run in reversed(path.entered):
            self._compact(run)
        self._compact(last)

    def release(self, block: SequenceHash, bit: int, *, unwanted: Container[SequenceHash]) -> list[Lost]:
        """Take `bit` from `block`, which it holds, from the `unwanted` right above it in its run, and from all below.

        Returns what it lost, with local hashes where not all of it is unwanted.
        """
        located = self.locate(block)
        assert located is not None
        run, at = located
        while at and run.hashes[at - 1] in unwanted:
            at -= 1
        if at and run.mask == bit and run.first_child is None:
            return [self._cut(run, at, unwanted)]
        if at:
            _, run = self._split(run, at)
        lost: list[Lost] = []
        touched: list[Run] = []
        stack = [run]
        while stack:
            run = stack.pop()
            touched.append(run)
            lost.append(lost_from(run, 0, unwanted))
            self.pairs -= len(run.hashes)
            run.mask &= ~bit
            stack += [child for child in run.children() if child.mask & bit]
        for run in reversed(touched):
            self._prune(run)
        return lost

    def begin_wipe(self, bits: int) -> None:
        """Begin to take `bits` from every run; no other wipe may be open, and nobody may hold with them meanwhile."""
        assert not self.wiping
        self.wiping = bits
        self._cursor = len(self.order)

    def wipe(self, run_count: int) -> int:
        """Wipe up to `run_count` runs; return the bits once none has them any more, else 0."""
        while run_count > 0 and self._cursor:
            run_count -= 1
            self._cursor -= 1
            run = self.order[self._cursor]
            if run.mask & self.wiping:
                self._clean(run)
                self._prune(run)
        if self._cursor:
            return 0
        wiped, self.wiping = self.wiping, 0
        return wiped

    def _clean(self, run: Run) -> None:
        if run.mask & self.wiping:
            self.pairs -= (run.mask & self.wiping).bit_count() * len(run.hashes)
            run.mask &= ~self.wiping

    def _short_of_new(self, blocks: Sequence[SequenceHash]) -> list[int] | None:
        """Return the short hashes of blocks that no run has; None if one has, or if one comes twice."""
        short = [block & SHORT for block in blocks]
        return short if self.by_hash.keys().isdisjoint(short) and len(set(short)) == len(short) else None

    def _append(self, run: Run, hashes: "array[int]", short: list[int], keys: "array[int]", bit: int) -> None:
        """Add new blocks below a run's last: into it, if one bit holds it and nothing is below, and into new runs."""
        self.pairs += len(hashes)
        at = 0
        held = len(run.hashes)
        if held < RUN_BLOCKS and run.mask == bit and run.first_child is None and bool(keys) == bool(run.keys):
            at = RUN_BLOCKS - held
            run.hashes += hashes[:at]
            run.keys += keys[:at]
            self._enter(run, held, short[:at])
        for first in range(at, len(hashes), RUN_BLOCKS):
            stop = first + RUN_BLOCKS
            run = self._add(Run(hashes[first:stop], keys[first:stop], bit, run, run.end))
            self._enter(run, 0, short[first:stop])

    def _cut(self, run: Run, at: int, unwanted: Container[SequenceHash]) -> Lost:
        """Shorten a run that nobody else holds and nothing is below."""
        lost = lost_from(run, at, unwanted)
        self._unname(run, at)
        self.pairs -= len(lost.hashes)
        del run.hashes[at:], run.keys[at:]
        self._compact(run)
        return lost

    def _name(self, run: Run, start: int = 0, stop: int | None = None) -> None:
        """Let the dictionaries lead from the blocks between two positions to this run."""
        self._enter(run, start, [block & SHORT for block in run.hashes[start:stop]])

    def _enter(self, run: Run, start: int, short: list[int]) -> None:
        """The same from a position on, given the short hashes."""
        self.by_hash.update(zip(short, repeat(run.number), strict=False))
        for at in named_positions(run, start, start + len(short)):
            self.by_key[run.keys[at]] = run

    def _unname(self, run: Run, start: int = 0) -> None:
        """Take the blocks of this run from a position on out of the dictionaries."""
        for block in run.hashes[start:]:
            del self.by_hash[block & SHORT]
        for at in named_positions(run, start, None):
            self._unname_key(run, run.keys[at])

    def _unname_key(self, run: Run, key: int) -> None:
        if self.by_key.get(key) is run:  # false only where two blocks came with one key
            del self.by_key[key]

    def _add(self, run: Run) -> Run:
        """Link a run below its parent and into the order, past the cursor: it must be clean."""
        link(run)
        run.slot = len(self.order)
        self.order.append(run)
        if not self._free_numbers:
            self._free_numbers.append(len(self._numbered))
            self._numbered.append(None)
        run.number = self._free_numbers.pop()
        self._numbered[run.number] = run
        self.unkeyed_runs += not run.keys
        return run

    def _drop(self, run: Run) -> None:
        """Take a run out of the order; the last one takes its place and is wiped again at worst."""
        last = self.order.pop()
        if last is not run:
            self.order[run.slot] = last
            last.slot = run.slot
        run.slot = -1
        self._numbered[run.number] = None
        self._free_numbers.append(run.number)
        self._cursor = min(self._cursor, len(self.order))
        self.unkeyed_runs -= not run.keys

    def _split(self, run: Run, at: int) -> tuple[Run, Run]:
        """Split before position `at`; the new run is the upper one if any is below, so that none is re-linked."""
        self._clean(run)
        if run.first_child is not None:
            unlink(run)
            upper = self._add(Run(run.hashes[:at], run.keys[:at], run.mask, run.parent, run.depth))
            del run.hashes[:at], run.keys[:at]
            run.depth += at
            run.parent = upper
            link(run)
            self._name(upper)
            self._name(run, 0, 1)
            return upper, run
        lower = self._add(Run(run.hashes[at:], run.keys[at:], run.mask, run, run.depth + at))
        del run.hashes[at:], run.keys[at:]
        self._name(lower)
        return run, lower

    def _prune(self, run: Run) -> None:
        """Drop a run that nobody holds and nothing is below, then those above it; join what is left."""
        while run.slot >= 0 and not run.mask and run.first_child is None:
            self._unname(run)
            unlink(run)
            self._drop(run)
            assert run.parent is not None
            run = run.parent
        self._compact(run)

    def _compact(self, run: Run) -> None:
        """Join a run with its only child and with its parent where the same bits hold them and the blocks fit."""
        if run.slot < 0:
            return
        if run.first_child is not None and run.first_child.next_sibling is None:
            run = self._join(run, run.first_child)
        parent = run.parent
        if parent is not None and parent.slot >= 0 and parent.first_child is run and run.next_sibling is None:
            self._join(parent, run)

    def _join(self, upper: Run, lower: Run) -> Run:
        """Join two runs, moving the fewer links, and return the one that stays; `upper` if they do not join."""
        held = len(upper.hashes)
        if upper.mask != lower.mask or held + len(lower.hashes) > RUN_BLOCKS or bool(upper.keys) != bool(lower.keys):
            return upper
        if lower.keys and not lower.begins_at_anchor:
            self._unname_key(lower, lower.keys[0])
        if len(lower.hashes) <= held and lower.first_child is None:
            upper.hashes += lower.hashes
            upper.keys += lower.keys
            upper.first_child = None
            self._drop(lower)
            self._name(upper, held)
            return upper
        lower.hashes[:0] = upper.hashes
        lower.keys[:0] = upper.keys
        lower.depth = upper.depth
        unlink(upper)
        lower.parent = upper.parent
        link(lower)
        self._drop(upper)
        self._name(lower, 0, held)
        return lower

    def check_integrity(self) -> None:
        """Assert the laws at the top of the module; O(blocks)."""
        assert sum(len(run.hashes) for run in self.order) == len(self.by_hash)
        assert sum(len(run.hashes) * run.mask.bit_count() for run in self.order) == self.pairs
        assert sum(not run.keys for run in self.order) == self.unkeyed_runs
        assert 0 <= self._cursor <= len(self.order)
        assert len(self._numbered) == len(self.order) + len(self._free_numbers)
        for slot, run in enumerate(self.order):
            assert run.slot == slot
            assert self._numbered[run.number] is run
            assert 1 <= len(run.hashes) <= RUN_BLOCKS
            assert all(self.candidate(block) is run for block in run.hashes)
            assert run.mask or run.first_child
            assert slot < self._cursor or not run.mask & self.wiping
            assert run.parent is not None
            assert run.parent is self.root or run.parent.slot >= 0
            assert run in run.parent.children()
            assert run.depth == run.parent.end
            assert len(run.keys) in {0, len(run.hashes)}
            assert not run.keys or run.parent is self.root or run.parent.keys
        for key, run in self.by_key.items():
            assert run.slot >= 0
            assert key in {run.keys[at] for at in named_positions(run, 0, None)}
        for run in [self.root, *self.order]:
            for child in run.children():
                assert child.parent is run
                assert child.slot >= 0
                assert child.next_sibling is None or child.next_sibling.previous_sibling is child
        assert not self.root.hashes
        assert not self.root.keys
