"""
Two processes that survive a suspension; tests/distributed/test_watchdog.py runs them.

They meet at a barrier for some seconds. Meanwhile a child of the first process suspends both for longer than
`Watchdog` allows a silence, and then continues them.
"""

import os
import signal
import sys
import time

import utils.distributed.process_group
import utils.distributed.watchdog
from utils.common.processes import process_rank
from utils.distributed.collectives import barrier, gather_from_all
from utils.distributed.process_group import shut_down

SILENCE, SUSPENDED = 6.0, 9.0  # seconds


def main() -> None:
    utils.distributed.watchdog.SILENCE = SILENCE
    utils.distributed.process_group.init_process_group(use_deepspeed=False)
    processes = gather_from_all(os.getpid())
    if process_rank() == 0 and os.fork() == 0:
        for number, seconds in ((signal.SIGSTOP, SUSPENDED), (signal.SIGCONT, 0)):
            for process in processes:
                os.kill(process, number)
            time.sleep(seconds)
        os._exit(0)
    begun = time.monotonic()
    while gather_from_all(time.monotonic() - begun < SUSPENDED + 3)[0]:
        barrier()
        time.sleep(0.05)
    print("alive", flush=True)
    shut_down()


if __name__ == "__main__":
    sys.exit(main())
