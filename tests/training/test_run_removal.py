"""Machines that share a disk remove the same staging directory at the same time."""

import threading

from utils.training.checkpoints import remove


def test_what_another_machine_removes_is_removed(tmp_path):
    for number in range(10):
        directory, failed = tmp_path / str(number), []
        for name in ("a", "b", "c"):
            (directory / name).mkdir(parents=True)
            for number_of_file in range(60):
                (directory / name / str(number_of_file)).touch()
        start = threading.Barrier(4)

        def machine(directory=directory, failed=failed, start=start):
            start.wait()
            try:
                remove(directory)
            except OSError as error:
                failed.append(error)

        machines = [threading.Thread(target=machine) for _ in range(4)]
        for thread in machines:
            thread.start()
        for thread in machines:
            thread.join()
        assert not failed and not directory.exists()
