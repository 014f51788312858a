"""One process at a run, also when a worker was killed before it told anybody of its child."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from infra.at_work import alone_at, forget_ended, is_alive, is_at_work, mark_of, process_name

HOLD = """
import sys
from pathlib import Path
from infra.at_work import alone_at
with alone_at(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return mark_of(tmp_path, uuid4())


def start(mark: Path) -> "subprocess.Popen[str]":
    """A process that is at work on the run until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(mark)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout
    assert started.stdout.readline() == "held\n"
    return started


def end(process: "subprocess.Popen[str]") -> None:
    process.communicate("\n")
    assert process.returncode == 0


def test_who_is_at_work_is_seen_for_its_life(mark):
    assert not is_at_work(mark)
    first = start(mark)
    assert is_at_work(mark)
    end(first)
    assert not is_at_work(mark)
    assert not mark.exists()


def test_a_second_process_at_a_run_ends_the_first(mark):
    """It was killed with nobody to notice, or its run was given out again: what it did is done, and done once."""
    first = start(mark)
    second = start(mark)
    assert first.wait(60) == -signal.SIGKILL
    assert mark.read_text() == process_name(second.pid)
    end(second)
    assert not mark.exists()


def test_other_runs_are_not_disturbed(mark):
    first, second = start(mark), start(mark_of(mark.parents[1], uuid4()))
    assert first.poll() is None
    end(first)
    end(second)


def test_what_a_killed_process_leaves_holds_nobody_up_and_is_removed(mark):
    killed, working = start(mark), start(mark_of(mark.parents[1], uuid4()))
    killed.kill()
    killed.wait()
    assert mark.exists()
    assert not is_at_work(mark)
    forget_ended(mark.parents[1])
    assert [one.read_text() for one in mark.parent.iterdir()] == [process_name(working.pid)]
    end(working)


def test_a_process_of_an_earlier_boot_is_not_killed_for_its_number(mark):
    """The number in what a power cut left behind may be anybody's by now; here it is this process's."""
    boot, pid, started = process_name(os.getpid()).split(":")
    mark.parent.mkdir()
    mark.write_text(f"{boot}:{pid}:{int(started) + 1}")
    with alone_at(mark):
        assert mark.read_text() == process_name(os.getpid())


def test_a_home_that_cannot_be_written_stops_no_step(tmp_path):
    """The step itself says what is wrong with the disk."""
    (tmp_path / "runs").write_text("a file where a folder is wanted")
    with alone_at(mark_of(tmp_path, uuid4())):
        pass


def test_a_process_is_known_by_more_than_its_number():
    me = process_name(os.getpid())
    boot, pid, started = me.split(":")
    assert is_alive(me)
    assert not is_alive(f"{boot}:{pid}:{int(started) + 1}")
    assert not is_alive(f"{'0' * len(boot)}:{pid}:{started}")
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = process_name(ended.pid)
    assert is_alive(name)
    ended.communicate()
    assert not is_alive(name)


@pytest.mark.parametrize("name", ["", "1234", "a:b:c", "::", "host:1", "boot:-1:1"])
def test_what_names_no_process_is_not_alive(name):
    assert not is_alive(name)
