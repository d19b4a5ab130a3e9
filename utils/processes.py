"""Processes that must not outlive the one that started them."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent(number: signal.Signals) -> None:
    """Has the signal sent to this process when its parent dies; it would go on unseen, beside what replaces it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
