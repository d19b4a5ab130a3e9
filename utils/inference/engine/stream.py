"""
An engine for many callers at once: sequences in at any time, their tokens out as they are chosen.

`EngineServer` runs the engine's steps in a thread of its own. Coroutines iterate over `generate`, threads over
`stream`; who leaves the loop cancels the sequence. tools/chat_model.py calls it, and a server can.

Tokens wait for their consumer in a queue of its own, so a slow one delays nobody; it gets all that wait at once. The
queue is not bounded, but holds `max_new_tokens` integers at most.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue

import torch

from utils.inference.engine import Engine, NewTokens
from utils.inference.engine.scheduler import TokenSequence

Item = NewTokens | BaseException  # for a consumer; an error is the last
Put = Callable[[Item], None]  # hands it over, from the engine's thread


class EngineServer(AbstractContextManager):
    """
    Runs an engine, which nobody else may call from then on, until it is closed or the engine fails.

    Args:
        engine: without sequences.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._changed = threading.Condition()  # around all of the following
        self._consumers: dict[TokenSequence, Put] = {}
        self._added: list[TokenSequence] = []
        self._cancelled: list[TokenSequence] = []
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, sequence: TokenSequence) -> AsyncIterator[NewTokens]:
        """
        Yield the answer's tokens as they are chosen; the last have a `finish_reason`.

        Leaving the loop or cancelling the task cancels the sequence. Whoever keeps the iterator closes it by
        `contextlib.aclosing`.

        Raises:
            ValueError: see `Engine.check`.
            RuntimeError: the server is closed.
            Exception: what the engine raised; every consumer gets it, and the server has ended.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Item]()

        def put(item: Item) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, item)

        self._add([sequence], put)
        try:
            while True:
                for tokens in take_waiting(await arrived.get(), arrived):
                    yield tokens
                    if tokens.finish_reason:
                        return
        finally:
            self._cancel(sequence)

    def stream(self, *sequences: TokenSequence) -> Iterator[NewTokens]:
        """
        Yield the tokens of several sequences as they are chosen, until all have ended.

        Closing the iterator cancels those that have not. Raises as `generate`.
        """
        arrived: SimpleQueue[Item] = SimpleQueue()
        remaining = set(sequences)
        try:
            self._add(sequences, arrived.put)
            while remaining:
                for tokens in take_waiting(arrived.get(), arrived):
                    yield tokens
                    if tokens.finish_reason:
                        remaining.remove(tokens.sequence)
        finally:
            for sequence in remaining:
                self._cancel(sequence)

    def close(self) -> None:
        """End the engine's thread after its step; consumers that wait get a RuntimeError."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether sequences are answered: the server is not closed, and the engine has not failed."""
        with self._changed:
            return self._error is None and not self._closing

    def _add(self, sequences: Sequence[TokenSequence], put: Put) -> None:
        """Add sequences, all to the same step."""
        for sequence in sequences:
            self.engine.check(sequence)
        with self._changed:
            if self._error:
                raise self._error
            self._consumers |= dict.fromkeys(sequences, put)
            self._added += sequences
            self._changed.notify()

    def _cancel(self, sequence: TokenSequence) -> None:
        """Cancel a sequence unless it has ended."""
        with self._changed:
            if self._consumers.pop(sequence, None):
                self._cancelled.append(sequence)
                self._changed.notify()

    def _run(self) -> None:
        """Run the engine's thread: step while there is work, and wait for sequences while there is none."""
        try:
            if self.engine.runner.on_gpu:
                torch.cuda.set_device(self.engine.runner.device)  # a new thread's is the first
            while self._take_requests():
                for tokens in self.engine.step():
                    self._deliver(tokens)
            error: BaseException = RuntimeError("the engine's server is closed")
        except BaseException as failure:  # whatever it is, consumers must not wait for ever
            error = failure
        with self._changed:
            self._error = error
            consumers = list(self._consumers.values())
            self._consumers.clear()
        for put in consumers:
            hand_over(put, error)

    def _take_requests(self) -> bool:
        """Add and cancel what consumers asked for, once there is something to do; return False to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._added or self._cancelled or self.engine.has_work)
            added, self._added = self._added, []
            cancelled, self._cancelled = self._cancelled, []
            closing = self._closing
        for sequence in added:
            self.engine.add(sequence)
        for sequence in cancelled:
            self.engine.cancel(sequence)
        return not closing

    def _deliver(self, tokens: NewTokens) -> None:
        with self._changed:
            put = self._consumers.get(tokens.sequence)
            if tokens.finish_reason:
                self._consumers.pop(tokens.sequence, None)
        if put and not hand_over(put, tokens):
            self._cancel(tokens.sequence)


def take_waiting(first: Item, queue: "SimpleQueue[Item] | asyncio.Queue[Item]") -> Iterator[NewTokens]:
    """Yield what is in a queue after its `first` item, the tokens of each sequence together; raise an error in it."""
    joined: dict[TokenSequence, NewTokens] = {}
    item, error = first, None
    while True:
        if isinstance(item, BaseException):
            error = item
        else:
            before = joined[item.sequence].token_ids if item.sequence in joined else []
            joined[item.sequence] = item._replace(token_ids=before + item.token_ids)
        if queue.empty():  # nobody else takes from it
            break
        item = queue.get_nowait()
    yield from joined.values()
    if error:
        raise error


def hand_over(put: Put, item: Item) -> bool:
    """Call `put`; return False where the consumer's event loop is closed."""
    try:
        put(item)
    except RuntimeError:
        return False
    return True
