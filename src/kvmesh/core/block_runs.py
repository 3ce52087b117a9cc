"""The tree of blocks under `PrefixIndex`: which bits hold which key, a radix tree whose nodes are found by hash.

A run is a stretch of one sequence that the same bits hold. Laws, checked by `check_integrity`:
    - every key lies in exactly one run, of 1 to `RUN_KEYS` keys, so that splitting and joining are bounded;
    - a bit that is not being wiped is in a run only if it is in the run above (closed prefix);
    - a run without bits has runs below it: it goes when they do;
    - runs at and past the wipe's cursor have none of the bits being wiped.

Compared with a textbook radix tree, children are found through the one key dictionary, so a node costs no map of its
own, and a key costs one dictionary entry and one list slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.core.ids import SequenceHash

RUN_KEYS = 64
"""Most keys in a run: the cost of a split against the bytes per key."""


@dataclass(slots=True, eq=False)
class Run:
    """A stretch of one sequence. The root has no keys, no parent and every bit."""

    keys: list[SequenceHash]
    mask: int
    parent: "Run | None"
    children: "set[Run] | None" = None
    slot: int = -1
    """Position in the wipe's order; -1 when it is not, or no longer, in the tree."""

    @property
    def parent_key(self) -> SequenceHash | None:
        """The block above the first of this run; None for a sequence's first block."""
        return self.parent.keys[-1] if self.parent and self.parent.keys else None


@dataclass(frozen=True, slots=True)
class Path:
    """Where a sequence of blocks leads from a known block: first through runs, then into the unknown."""

    start: Run
    """The run of the known block."""
    in_start: int
    """Blocks of the sequence that lie in it too."""
    entered: list[Run]
    """The runs after it."""
    end: int
    """Keys of the last run that are on the path."""
    rest: list[SequenceHash]
    """Blocks that no run has."""

    @property
    def last(self) -> Run:
        """The run in which the known part ends."""
        return self.entered[-1] if self.entered else self.start

    def held(self, bit: int) -> int:
        """Count the leading blocks of the sequence that `bit` holds, given that it holds the known block."""
        count = self.in_start
        for run in self.entered:
            if not run.mask & bit:
                break
            count += self.end if run is self.entered[-1] else len(run.keys)
        return count


class RunTree:
    """Keys, the bits that hold them, and the wiping of bits that are given up."""

    def __init__(self) -> None:
        self.root = Run([], -1, None)
        self.runs: dict[SequenceHash, Run] = {}
        """By key; to be changed by this class alone."""
        self.order: list[Run] = []
        """All runs but the root; to be changed by this class alone."""
        self.pairs = 0
        """(bit, key) pairs held, bits being wiped included."""
        self.wiping = 0
        """Bits being wiped."""
        self._cursor = 0

    def parent_of(self, key: SequenceHash) -> SequenceHash | None:
        """Return the block above a key of the tree."""
        run = self.runs[key]
        at = run.keys.index(key)
        return run.keys[at - 1] if at else run.parent_key

    def follow(self, parent: SequenceHash | None, keys: Sequence[SequenceHash]) -> Path | None:
        """Find where `keys` below `parent`, a key of the tree or None, lead; None if one has another parent already."""
        run = start = self.root if parent is None else self.runs[parent]
        end = start.keys.index(parent) + 1 if parent is not None else 0
        in_start = 0
        entered: list[Run] = []
        at = 0
        while at < len(keys):
            if end < len(run.keys):
                if run.keys[end] != keys[at]:
                    break
                end += 1
                in_start += not entered
            else:
                below = self.runs.get(keys[at])
                if below is None:
                    break
                if below.parent is not run or below.keys[0] != keys[at]:
                    return None
                entered.append(below)
                run, end = below, 1
            at += 1
        rest = list(keys[at:])
        distinct = set(rest)
        if len(distinct) != len(rest) or not self.runs.keys().isdisjoint(distinct):
            return None
        return Path(start, in_start, entered, end, rest)

    def hold(self, path: Path, bit: int) -> None:
        """Give `bit` every block of a path just followed; it must hold the path's start."""
        last = path.last
        below: Run | None = None
        if path.end < len(last.keys) and (path.rest or not last.mask & bit):
            last, below = self._split(last, path.end)
        for run in [*path.entered[:-1], last] if path.entered else ():
            if not run.mask & bit:
                run.mask |= bit
                self.pairs += len(run.keys)
        self._append(last, path.rest, bit)
        if below is not None:
            self._prune(below)
        for run in reversed(path.entered):
            self._compact(run)
        self._compact(last)

    def release(self, key: SequenceHash, bit: int) -> dict[SequenceHash, SequenceHash | None]:
        """Take `bit` from `key`, which holds it, and from all below; return what it lost, with parents, top down."""
        run = self.runs[key]
        at = run.keys.index(key)
        if at:
            _, run = self._split(run, at)
        lost: dict[SequenceHash, SequenceHash | None] = {}
        touched: list[Run] = []
        stack = [run]
        while stack:
            run = stack.pop()
            touched.append(run)
            above = run.parent_key
            for block in run.keys:
                lost[block] = above
                above = block
            run.mask &= ~bit
            if run.children:
                stack += [child for child in run.children if child.mask & bit]
        self.pairs -= len(lost)
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
        self.pairs -= (run.mask & self.wiping).bit_count() * len(run.keys)
        run.mask &= ~self.wiping

    def _append(self, run: Run, keys: list[SequenceHash], bit: int) -> None:
        self.pairs += len(keys)
        at = 0
        if run.mask == bit and not run.children:
            at = max(RUN_KEYS - len(run.keys), 0)
            run.keys += keys[:at]
            self.runs.update(dict.fromkeys(keys[:at], run))
        for first in range(at, len(keys), RUN_KEYS):
            run = self._add(Run(keys[first : first + RUN_KEYS], bit, run))
            self.runs.update(dict.fromkeys(run.keys, run))

    def _add(self, run: Run) -> Run:
        """Link a run below its parent and into the order, past the cursor: it must be clean."""
        _link(run)
        run.slot = len(self.order)
        self.order.append(run)
        return run

    def _drop(self, run: Run) -> None:
        """Take a run out of the order; the last one takes its place and is wiped again at worst."""
        last = self.order.pop()
        if last is not run:
            self.order[run.slot] = last
            last.slot = run.slot
        run.slot = -1
        self._cursor = min(self._cursor, len(self.order))

    def _split(self, run: Run, at: int) -> tuple[Run, Run]:
        """Split before key `at`. The new run is the upper one if any run is below, so that none has to be re-linked."""
        self._clean(run)
        if run.children:
            _unlink(run)
            upper = self._add(Run(run.keys[:at], run.mask, run.parent))
            del run.keys[:at]
            self.runs.update(dict.fromkeys(upper.keys, upper))
            run.parent = upper
            _link(run)
            return upper, run
        lower = self._add(Run(run.keys[at:], run.mask, run))
        del run.keys[at:]
        self.runs.update(dict.fromkeys(lower.keys, lower))
        return run, lower

    def _prune(self, run: Run) -> None:
        """Drop a run that nobody holds and nothing is below, then those above it; join what is left."""
        while run.slot >= 0 and not run.mask and not run.children:
            for key in run.keys:
                del self.runs[key]
            _unlink(run)
            self._drop(run)
            assert run.parent is not None
            run = run.parent
        self._compact(run)

    def _compact(self, run: Run) -> None:
        """Join a run with its only child and with its parent where the same bits hold them and the keys fit."""
        if run.slot < 0:
            return
        if run.children and len(run.children) == 1:
            run = self._join(run, next(iter(run.children)))
        parent = run.parent
        if parent is not None and parent.slot >= 0 and len(parent.children or ()) == 1:
            self._join(parent, run)

    def _join(self, upper: Run, lower: Run) -> Run:
        """Join two runs, moving the fewer links, and return the one that stays; `upper` if they do not join."""
        if upper.mask != lower.mask or len(upper.keys) + len(lower.keys) > RUN_KEYS:
            return upper
        if len(lower.keys) + len(lower.children or ()) <= len(upper.keys):
            self.runs.update(dict.fromkeys(lower.keys, upper))
            upper.keys += lower.keys
            upper.children = lower.children
            for child in upper.children or ():
                child.parent = upper
            self._drop(lower)
            return upper
        self.runs.update(dict.fromkeys(upper.keys, lower))
        lower.keys[:0] = upper.keys
        _unlink(upper)
        lower.parent = upper.parent
        _link(lower)
        self._drop(upper)
        return lower

    def check_integrity(self) -> None:
        """Assert the laws at the top of the module; O(keys)."""
        assert sum(len(run.keys) for run in self.order) == len(self.runs)
        assert sum(len(run.keys) * run.mask.bit_count() for run in self.order) == self.pairs
        assert 0 <= self._cursor <= len(self.order)
        for slot, run in enumerate(self.order):
            assert run.slot == slot
            assert 1 <= len(run.keys) <= RUN_KEYS
            assert all(self.runs[key] is run for key in run.keys)
            assert run.mask or run.children
            assert slot < self._cursor or not run.mask & self.wiping
            assert run.parent is not None
            assert run.parent is self.root or run.parent.slot >= 0
            assert run in (run.parent.children or ())
        for run in [self.root, *self.order]:
            for child in run.children or ():
                assert child.parent is run
                assert child.slot >= 0


def _link(run: Run) -> None:
    assert run.parent is not None
    if run.parent.children is None:
        run.parent.children = set()
    run.parent.children.add(run)


def _unlink(run: Run) -> None:
    assert run.parent is not None
    assert run.parent.children is not None
    run.parent.children.discard(run)
    if not run.parent.children:
        run.parent.children = None
