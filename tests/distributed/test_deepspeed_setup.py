"""Locks of killed builds go; those of running builds stay."""

import os
import time

import pytest

from utils.distributed.deepspeed_setup import LONGEST_BUILD, remove_stale_build_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    path = tmp_path / "cpu_adam" / "lock"
    path.touch()
    return path


def test_a_lock_that_no_process_holds_is_removed(lock):
    assert remove_stale_build_locks() == [lock]
    assert not lock.exists()
    assert remove_stale_build_locks() == []


def test_the_lock_of_a_running_build_stays(lock):
    with lock.open():
        assert remove_stale_build_locks() == []
    assert lock.exists()


def test_with_several_machines_a_lock_must_also_be_old(lock):
    assert remove_stale_build_locks(several_machines=True) == []
    past = time.time() - LONGEST_BUILD - 1
    os.utime(lock, (past, past))
    assert remove_stale_build_locks(several_machines=True) == [lock]
