"""
The watchdog: every process of a distributed run watches the others; if one dies or is cut off, all end and say why.

process_group.py starts it. torchrun's agent ends the others too, but without a line that says which one was killed,
and not across machines that were launched one by one; a collective waits for its timeout, or forever.
"""

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

BEAT = 1.0  # seconds between two signs of life
MISSED_BEATS = 2  # after more of them without running, the process was suspended
SILENCE = 30.0  # seconds without a sign of life after which a process counts as lost
VERDICT = SILENCE + 10  # seconds that a process whose connection broke waits to learn whose fault it was
KILLED = "was killed, perhaps because memory ran out (dmesg shows it)"
STOPPED = "stopped by "  # how the message of an Interrupted begins
# What errors of a broken connection say.
CONNECTION = re.compile("gloo|nccl|connection|socket|store|timed out|broken pipe|process ?group", re.IGNORECASE)


class AwakeClock:
    """
    Counts the seconds for which this process ran.

    A suspension (SIGSTOP, Ctrl-Z, a paused container) does not count: all processes of a run are suspended together,
    and none can give a sign of life.

    Threads ask it every `BEAT` seconds; if none asked for more than `MISSED_BEATS` of them, the process was suspended.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.awake, self.asked = 0.0, time.monotonic()

    def now(self) -> float:
        """Return the seconds that this process has run so far."""
        with self.lock:
            before, self.asked = self.asked, time.monotonic()
            self.awake += min(self.asked - before, MISSED_BEATS * BEAT)
            return self.awake


class Watchdog:
    """
    Gives signs of life and checks those of the other processes.

    They go through the launcher's store; on the same machine it checks process ids. It runs in threads, as the main
    thread may wait forever in a collective.

    Args:
        advice: what a user can do after a process is lost.
    """

    def __init__(self, process_rank: int, world_size: int, advice: str):
        self.advice = advice
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
        self.store_answered = self.clock.now()
        self.heard = dict.fromkeys(self.others, (b"", self.store_answered))
        self.done: set[int] = set()  # ranks that announced their end
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch_store)]
        for thread in self.threads:
            thread.start()
        self.unregister = on_failure(self.tell)

    def close(self) -> None:
        """Announce that this process ends normally."""
        self.unregister()
        with contextlib.suppress(RuntimeError):  # the process that holds the store has ended already
            self.store.set(f"ended.{self.rank}", "done")
        self._stop()

    def tell(self, error: BaseException) -> None:
        """
        Tell the others of this process's failure.

        If another process's failure broke the connection, waits until that is known; the process then ends with one
        line instead of the traceback of a broken connection. At a signal, by which a launcher ends the remaining
        processes, prints first which process died, if one did.
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
        """
        Wait for the threads to end.

        One that is in a call to the store when the interpreter ends would abort the process.
        """
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
                    self._check(rank)
            except RuntimeError:  # the store died with its process, or is silent: `_watch_store` counts that
                dead = self._dead_here()
                if dead is not None and not self.ended.wait(BEAT):
                    self._end(dead, KILLED)
                continue
            self.store_answered = self.clock.now()

    def _check(self, rank: int) -> None:
        """
        End this process if another one has failed or is lost.

        It is lost if its process died, or if it gave no sign of life for SILENCE seconds.
        """
        if self.store.check([f"ended.{rank}"]):
            reason = self.store.get(f"ended.{rank}").decode()
            if reason != "done":
                # A signal reaches every process of a machine, and the failed one has printed it.
                is_printed = self.who[rank][0] == self.host and not reason.startswith(STOPPED)
                self._end(rank, f"ended: {reason}", is_printed)
            self.done.add(rank)
            return
        if rank == self._dead_here():
            time.sleep(BEAT)  # a process that ends normally announces it just before
            if not self.store.check([f"ended.{rank}"]):
                self._end(rank, KILLED)
            return
        beat = self.store.get(f"beat.{rank}") if self.store.check([f"beat.{rank}"]) else b""
        if beat != self.heard[rank][0]:
            self.heard[rank] = (beat, self.clock.now())
        elif self.clock.now() - self.heard[rank][1] > SILENCE:
            self._end(rank, f"gave no sign of life for {SILENCE:.0f} s: it was killed, or its machine is cut off")

    def _dead_here(self) -> int | None:
        """Return a rank whose process on this machine died unannounced, or None."""
        for rank, (host, process_id) in self.who.items():
            if host == self.host and rank not in self.done and not os.path.exists(f"/proc/{process_id}"):
                return rank
        return None

    def _watch_store(self) -> None:
        while not self.ended.wait(BEAT):
            if self.clock.now() - self.store_answered > SILENCE:
                self._end(0, f"or its launcher at {self.master} was silent for {SILENCE:.0f} s: killed, or cut off")

    def _end(self, rank: int, why: str, is_printed: bool = False) -> None:
        """
        End this process.

        One on each machine prints why, unless the failed process has printed it there.
        """
        host, process_id = self.who.get(rank, (self.host, os.getpid()))
        here = [other for other in self.others if self.who[other][0] == self.host and other != rank]
        if not is_printed and all(self.rank < other for other in here):
            print(
                f"{os.path.basename(sys.argv[0])}: error: rank {rank} (process {process_id} on {host.split('/')[0]}) "
                f"{why}; {self.advice}",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)
