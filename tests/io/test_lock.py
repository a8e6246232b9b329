"""Whole runs that meet each other are in training/test_faults.py."""

import os

import pytest

from imgdit.io.lock import WRITER, only_writer


def elsewhere(folder, then=lambda: os._exit(0)):
    """0 if another process may write the folder, 3 if it is refused with the caption."""
    child = os.fork()
    if child == 0:
        try:
            with only_writer(folder):
                then()
        except ValueError as error:
            told = f"{folder} is being written by process {os.getppid()} on"
            os._exit(3 if str(error).startswith(told) and "choose another run.folder" in str(error) else 4)
        os._exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_one_process_at_a_time(tmp_path):
    with only_writer(tmp_path / "run"):
        assert elsewhere(tmp_path / "run") == 3
        assert elsewhere(tmp_path / "run") == 3  # the refused one took nothing away
        assert elsewhere(tmp_path / "other") == 0
    assert elsewhere(tmp_path / "run") == 0


def test_this_process_counts_too(tmp_path):
    with only_writer(tmp_path):
        with pytest.raises(ValueError, match="is being written by this process already"):
            with only_writer(tmp_path / "." / ".." / tmp_path.name):
                pass
        assert elsewhere(tmp_path) == 3
    with only_writer(tmp_path):
        pass


def test_the_dead_hold_nothing(tmp_path):
    assert elsewhere(tmp_path, then=os.abort) < 0
    assert (tmp_path / WRITER).read_text().startswith("process ")
    with only_writer(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / WRITER).read_text()


def test_data_workers_do_not_inherit_it(tmp_path):
    """A process that is killed while a fork of it lives on."""
    read, write = os.pipe()

    def leave_a_fork():
        if os.fork() == 0:
            os.read(read, 1)  # until the test ends it
            os._exit(0)
        os._exit(0)

    assert elsewhere(tmp_path, then=leave_a_fork) == 0
    with only_writer(tmp_path):
        pass
    os.write(write, b"x")
