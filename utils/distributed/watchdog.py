"""A process of a distributed run watches the others: when one dies or is cut off, the rest end soon, and say why."""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from datetime import timedelta

from utils.common.script import on_failure

import torch

from utils.common.errors import RunError
from utils.common.signals import Interrupted

BEAT = 1.0  # seconds
MISSED_BEATS = 2
SILENCE = 30.0  # seconds without a sign of life, after which a process counts as lost
KILLED = "was killed, perhaps for want of memory (dmesg says so)"
VERDICT = SILENCE + 10  # seconds that a process whose connection broke waits to learn whose fault it was
STOPPED = "stopped by "  # how the reason of an Interrupted begins
CONNECTION = re.compile("gloo|nccl|connection|socket|store|timed out|broken pipe|process ?group", re.IGNORECASE)


class AwakeClock:
    """
    Seconds for which this process ran. Those of a suspension (SIGSTOP, Ctrl-Z, a paused container) do not count: all
    processes of a run are suspended together, and none could give a sign of life.

    Threads ask it every `BEAT` seconds; where nobody asked for longer than `MISSED_BEATS` of them, none ran.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.awake, self.asked = 0.0, time.monotonic()

    def now(self) -> float:
        with self.lock:
            before, self.asked = self.asked, time.monotonic()
            self.awake += min(self.asked - before, MISSED_BEATS * BEAT)
            return self.awake


class Watchdog:
    """
    Every process says through the launcher's store that it lives, and looks whether the others do: by their process id
    on the same machine, by their signs of life elsewhere. Threads of their own do it, since the main one waits for
    ever in a collective whose other side is gone. `mend` tells a user what to do where one was lost.
    """

    def __init__(self, process_rank: int, world_size: int, mend: str):
        self.mend = mend
        self.rank, self.others = process_rank, [rank for rank in range(world_size) if rank != process_rank]
        self.host = f"{socket.gethostname()}/{os.readlink('/proc/self/ns/net')}"
        self.master = os.environ["MASTER_ADDR"]
        store = torch.distributed.TCPStore(
            self.master, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=SILENCE)
        )
        attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.store = torch.distributed.PrefixStore(f"peers.{attempt}", store)
        self.store.set(f"who.{self.rank}", json.dumps([self.host, os.getpid()]))
        self.who = {rank: json.loads(self.store.get(f"who.{rank}")) for rank in self.others}
        self.clock = AwakeClock()
        self.answered = self.clock.now()  # when the store last did
        self.heard = dict.fromkeys(self.others, (b"", self.answered))
        self.done: set[int] = set()  # those that said that they end
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch_store)]
        for thread in self.threads:
            thread.start()
        self.unregister = on_failure(self.tell)

    def close(self) -> None:
        """Says that this process ends as it should."""
        self.unregister()
        with contextlib.suppress(RuntimeError):  # the process that holds the store has ended already
            self.store.set(f"ended.{self.rank}", "done")
        self._stop()

    def tell(self, error: BaseException) -> None:
        """
        Of this process's own failure, tells the others. Where another's broke its connection, waits until that is
        known: the process then ends with one line in place of the traceback of a broken connection. At a signal, by
        which a launcher ends those that are left, or all, says first which one died, if one did.
        """
        if isinstance(error, Interrupted):
            with contextlib.suppress(RuntimeError):  # the store may have died
                self.done.update(rank for rank in self.others if self.store.check([f"ended.{rank}"]))
            dead = self._dead_here()
            if dead is not None:
                self._end(dead, KILLED)
        elif not isinstance(error, RunError) and CONNECTION.search(f"{type(error).__name__} {error}"):
            time.sleep(VERDICT)
            self._stop()
            return
        ours = isinstance(error, (RunError, Interrupted))
        reason = str(error) if ours else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            self.store.set(f"ended.{self.rank}", " ".join(reason.split())[:500])
        self._stop()

    def _stop(self) -> None:
        """Waits for the threads: one that the interpreter's end meets in a call to the store aborts the process."""
        self.ended.set()
        for thread in self.threads:
            thread.join(timeout=5 * BEAT)

    def _beat(self) -> None:
        beat = 0
        while not self.ended.wait(BEAT):
            beat += 1
            try:
                self.store.set(f"beat.{self.rank}", str(beat))
                for rank in self.others:
                    self._look(rank)
            except RuntimeError:  # the store died with its process, or `_watch_store` counts how long it is silent
                dead = self._dead_here()
                if dead is not None and not self.ended.wait(BEAT):
                    self._end(dead, KILLED)
                continue
            self.answered = self.clock.now()

    def _look(self, rank: int) -> None:
        if self.store.check([f"ended.{rank}"]):
            reason = self.store.get(f"ended.{rank}").decode()
            if reason != "done":
                # of a signal each process of a machine hears, and the first one says it
                heard = self.who[rank][0] == self.host and not reason.startswith(STOPPED)
                self._end(rank, f"ended: {reason}", heard)
            self.done.add(rank)
            return
        if rank == self._dead_here():
            time.sleep(BEAT)  # a process that ends well says so before it is gone
            if not self.store.check([f"ended.{rank}"]):
                self._end(rank, KILLED)
            return
        beat = self.store.get(f"beat.{rank}") if self.store.check([f"beat.{rank}"]) else b""
        if beat != self.heard[rank][0]:
            self.heard[rank] = (beat, self.clock.now())
        elif self.clock.now() - self.heard[rank][1] > SILENCE:
            self._end(rank, f"gave no sign of life for {SILENCE:.0f} s: it was killed, or its machine is cut off")

    def _dead_here(self) -> int | None:
        """A rank of this machine whose process is gone, and which did not say that it ends."""
        for rank, (host, process_id) in self.who.items():
            if host == self.host and rank not in self.done and not os.path.exists(f"/proc/{process_id}"):
                return rank
        return None

    def _watch_store(self) -> None:
        while not self.ended.wait(BEAT):
            if self.clock.now() - self.answered > SILENCE:
                self._end(0, f"or its launcher at {self.master} was silent for {SILENCE:.0f} s: killed, or cut off")

    def _end(self, rank: int, why: str, heard: bool = False) -> None:
        """Ends this process; one on each machine says why, unless the failed one has said it there itself."""
        host, process_id = self.who.get(rank, (self.host, os.getpid()))
        here = [other for other in self.others if self.who[other][0] == self.host and other != rank]
        if not heard and all(self.rank < other for other in here):
            print(
                f"{os.path.basename(sys.argv[0])}: error: rank {rank} (process {process_id} on {host.split('/')[0]}) "
                f"{why}; {self.mend}",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)
