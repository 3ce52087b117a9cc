"""Drives one engine on its one thread, and hands what it produces to the event loop.

One turn = the commands that piled up, then a step: a single hop to the engine's thread and back. Steps that take less
time than a hop share one, and an engine all of whose calls do (`EngineInfo.is_brief`) is called on the event loop.
While the modelled time of a step passes, commands go on being applied, so a pin never waits for a slow step that only
sleeps.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from kvmesh import telemetry
from kvmesh.core.errors import ConflictError, MeshError, Reason, TryElsewhereError
from kvmesh.core.ids import AttemptKey
from kvmesh.engines.engine import Engine, EngineLoad, EngineRequest, KvEvent, Output
from kvmesh.services.signal import Flag

log = telemetry.logger(__name__)

T = TypeVar("T")
_TIMER_SLACK_S = 0.005
"""How late a timer may be without the modelled time falling behind."""
_STEPS_PER_TURN = 8
_SHORT_TURN_S = 0.0002
"""A turn goes on stepping, so many times and so long at most: steps shorter than a hop are not worth one each."""
_TURNS_TO_CLIENT = 4
"""Turns of the event loop in which a first token gets to its client; the next step comes after them."""
_CLOSE_S = 10.0
"""How long a close waits for the engine's thread: a step that never ends must not keep its worker from stopping."""


class Listener(Protocol):
    """Who hears of one request; called on the event loop, in order."""

    def output(self, output: Output) -> None:
        """Take what a step produced; the last one has `finish` or `error` set."""

    def failed(self, error: MeshError) -> None:
        """Take the end of a request that the engine refused or lost; nothing follows."""


@dataclass(slots=True)
class _Command:
    apply: Callable[[Engine], Any]
    future: asyncio.Future[Any] | None = None
    """Who waits for the result; None for submits and cancels."""
    key: AttemptKey | None = None
    """The request a submit is about; `listener` hears of its refusal."""
    listener: Listener | None = None


@dataclass(slots=True)
class _Turn:
    replies: list[tuple[_Command, Any, Exception | None]] = field(default_factory=list)
    kv_events: list[KvEvent] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    duration_s: float = 0.0
    """Modelled time of its last step, the only one that may have any."""
    has_first_token: bool = False
    """A prompt was computed to its end."""
    load: EngineLoad = EngineLoad()
    has_work: bool = False
    crash: Exception | None = None


class EngineDriver:
    """Owns the engine and its thread. All methods are for the event loop.

    An engine whose step raised, or whose listener did, is not used again: what runs then fails with WORKER_LOST, and so
    does whatever is asked of it later, a close included. Nobody ever waits for an answer that cannot come.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_turn: Callable[[tuple[KvEvent, ...]], None],
        on_crash: Callable[[], None] = lambda: None,
        name: str,
    ) -> None:
        """Take the engine over; `on_turn` hears, after each turn that changed its load or its cache, of KV events."""
        self.info = engine.info
        self.load = EngineLoad(max_requests=engine.info.max_sequences, total_blocks=engine.info.total_blocks)
        """Figures after the last turn."""
        self.crash: Exception | None = None
        """What ended the engine; None while it is well."""
        self._engine = engine
        self._name = name
        self._on_turn = on_turn
        self._on_crash = on_crash
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"engine-{name}")
        self._commands: list[_Command] = []
        self._listeners: dict[AttemptKey, Listener] = {}
        self._dropped: set[AttemptKey] = set()
        """Cancelled since the step under way began: its outputs for them are nobody's, whoever has the key by then."""
        self._has_work = False
        self._applying: list[_Command] = []
        """The commands of the turn under way."""
        self._gone_because: str | None = None
        """Why the engine takes nothing any more."""
        self._wake = Flag()
        """Raised for the task below alone: there are commands, a step's time is over, or the engine closes."""
        self._task: asyncio.Task[None] | None = None
        self._step_ended_at = 0.0
        self._closed = False

    def start(self) -> None:
        """Begin to run turns."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="engine-driver")

    async def aclose(self) -> None:
        """Stop after the step under way, fail what still runs, free the engine. Idempotent."""
        self._lose_all("the engine was closed")
        self._wake.fire()
        task, self._task = self._task, None
        if task is not None:
            await asyncio.wait([task], timeout=_CLOSE_S)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if self._closed:
            return
        self._closed = True
        closing = asyncio.get_running_loop().run_in_executor(self._executor, self._engine.close)
        done, _ = await asyncio.wait([closing], timeout=_CLOSE_S)
        self._executor.shutdown(wait=False)
        if not done:
            log.error("engine.stuck", seconds=_CLOSE_S)
        elif (error := closing.exception()) is not None:
            log.error("engine.close_failed", exc_info=error)

    def submit(self, request: EngineRequest, listener: Listener) -> None:
        """Take a request in with the next turn; a refusal reaches the listener."""
        if self._gone_because is not None:
            listener.failed(_lost(self._gone_because))
            return
        if request.key in self._listeners:
            listener.failed(ConflictError(Reason.ALREADY_EXISTS, f"{request.key}: running already"))
            return
        self._listeners[request.key] = listener
        self._post(_Command(lambda engine: engine.submit(request), key=request.key, listener=listener))

    def cancel(self, key: AttemptKey) -> None:
        """Drop a request with the next turn; its listener hears nothing more. Idempotent."""
        if self._listeners.pop(key, None) is not None:
            self._dropped.add(key)
            self._post(_Command(lambda engine: engine.cancel(key)))

    def post(self, apply: Callable[[Engine], Any]) -> None:
        """Apply to the engine with the next turn, nobody waiting: for giving pins and imports back."""
        self._post(_Command(apply))

    async def call(self, apply: Callable[[Engine], T]) -> T:
        """Apply to the engine with the next turn and return the result. For questions: see `acquire` for the rest."""
        return await self.acquire(apply, undo=None)

    async def acquire(self, apply: Callable[[Engine], T], *, undo: Callable[[Engine, T], Any] | None) -> T:
        """As `call`; if the waiting is cancelled, `undo` gives back what was acquired, so that nothing leaks."""
        if self._gone_because is not None:
            raise _lost(self._gone_because)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._post(_Command(apply, future))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: self._give_back(done, undo))
            raise

    def _give_back(self, done: "asyncio.Future[T]", undo: Callable[[Engine, T], Any] | None) -> None:
        if done.cancelled() or done.exception() is not None or undo is None:
            return
        result = done.result()
        self.post(lambda engine: undo(engine, result))

    def _post(self, command: _Command) -> None:
        if self._gone_because is None:  # after the engine there is nothing to give back to
            self._commands.append(command)
            self._wake.fire()

    async def _run(self) -> None:
        try:
            while self._gone_because is None and self.crash is None:
                await self._run_turn()
        except Exception as error:  # a listener that raises would otherwise end the turns without a word
            self.crash = error
        if self.crash is not None:
            log.error("engine.crashed", exc_info=self.crash)
            self._lose_all(f"the engine failed: {self.crash!r}")
            self._on_crash()

    async def _run_turn(self) -> None:
        while not self._has_work and not self._commands and self._gone_because is None:
            await self._wake.wait()
        started_at = asyncio.get_running_loop().time()
        self._dropped.clear()
        turn = await self._take_turn(step=True)
        if turn.duration_s:
            await self._let_pass(turn.duration_s, started_at=started_at)
        for output in turn.outputs:
            self._deliver(output)
        if self.info.is_brief and not turn.duration_s:  # the turn itself has let nobody else run
            for _ in range(_TURNS_TO_CLIENT if turn.has_first_token else 1):
                await asyncio.sleep(0)

    async def _take_turn(self, *, step: bool) -> _Turn:
        self._applying, self._commands = self._commands, []
        if self.info.is_brief:
            turn = self._turn(self._applying, step)
        else:
            turn = await asyncio.get_running_loop().run_in_executor(self._executor, self._turn, self._applying, step)
        is_news = bool(turn.kv_events) or turn.has_first_token or turn.load != self.load
        self.load, self.crash, self._has_work = turn.load, turn.crash, turn.has_work
        for command, value, error in turn.replies:
            self._reply(command, value, error)
        if is_news:
            self._on_turn(tuple(turn.kv_events))
        return turn

    def _turn(self, commands: list[_Command], step: bool) -> _Turn:
        """Run on the engine's thread."""
        turn = _Turn()
        for command in commands:
            try:
                turn.replies.append((command, command.apply(self._engine), None))
            except Exception as error:  # a command's failure belongs to whoever posted it
                turn.replies.append((command, None, error))
        try:
            turn.kv_events += self._engine.drain_kv_events()
            turn.has_work = self._engine.has_work()
            if step and turn.has_work:
                self._take_steps(turn)
            turn.load = self._engine.load()
        except Exception as error:  # a step that raises leaves an engine nobody can trust
            turn.crash = error
        return turn

    def _take_steps(self, turn: _Turn) -> None:
        until = time.monotonic() + _SHORT_TURN_S
        for _ in range(_STEPS_PER_TURN):
            step = self._engine.step()
            turn.outputs += step.outputs
            turn.kv_events += step.kv_events
            turn.duration_s = step.duration_s
            turn.has_work = self._engine.has_work()
            turn.has_first_token = True in [output.prefill_done for output in step.outputs]
            is_urgent = turn.has_first_token or self._commands  # who waits for those waits for no further step
            if is_urgent or step.duration_s or not turn.has_work or time.monotonic() >= until:
                return

    async def _let_pass(self, duration_s: float, *, started_at: float) -> None:
        """Wait until the modelled step ends; a step that began right after another begins where that one ended."""
        if started_at - self._step_ended_at < _TIMER_SLACK_S:
            started_at = self._step_ended_at
        self._step_ended_at = started_at + duration_s
        is_over = False

        def end() -> None:
            nonlocal is_over
            is_over = True
            self._wake.fire()

        timer = asyncio.get_running_loop().call_at(self._step_ended_at, end)
        try:
            while not is_over and self._gone_because is None and self.crash is None:
                if self._commands:
                    await self._take_turn(step=False)
                else:
                    await self._wake.wait()
        finally:
            timer.cancel()

    def _reply(self, command: _Command, value: Any, error: Exception | None) -> None:
        if command.future is not None:
            if command.future.done():
                return
            if error is None:
                command.future.set_result(value)
            else:
                command.future.set_exception(error)
        elif error is not None and command.key is not None:
            listener = self._listeners.get(command.key)
            if listener is not None and listener is command.listener:
                del self._listeners[command.key]
                listener.failed(error if isinstance(error, MeshError) else MeshError(Reason.INTERNAL, str(error)))
        elif error is not None:
            log.warning("engine.command_failed", exc_info=error)

    def _deliver(self, output: Output) -> None:
        is_dropped = bool(self._dropped) and output.key in self._dropped
        listener = None if is_dropped else self._listeners.get(output.key)
        if listener is None:
            if output.pin is not None:  # cancelled while its last step ran: nobody owns the pin
                pin_id = output.pin.pin_id
                self.post(lambda engine: engine.unpin(pin_id))
            return
        if output.finish is not None or output.error is not None:
            del self._listeners[output.key]
        if output.error is not None:
            log.warning("request.failed", worker_id=self._name, request_id=output.key.request_id, detail=output.error)
        listener.output(output)

    def _lose_all(self, because: str) -> None:
        """Tell everybody, now and later, that nothing more will come."""
        if self._gone_because is not None:
            return
        self._gone_because = because
        listeners, self._listeners = self._listeners, {}
        commands, self._commands = self._applying + self._commands, []
        for listener in listeners.values():
            listener.failed(_lost(because))
        for command in commands:
            if command.future is not None and not command.future.done():
                command.future.set_exception(_lost(because))


def _lost(because: str) -> TryElsewhereError:
    return TryElsewhereError(Reason.WORKER_LOST, because)
