"""Which process of a host is at work on a run: for its life it holds the file HOME/runs/RUN-ID, in which its name is.

A worker that is killed leaves its steps at work, perhaps before the server was told of their processes. What is written here
tells the next worker of them, and lets no two work on one run.
"""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import UUID

POLL_S = 0.05


def actor_of(parameters: dict[str, Any]) -> str:
    """Whose step a run is: of the whole protocol, its publisher's."""
    return str(parameters.get("actor") or parameters.get("publisher") or "publisher")


def process_name(pid: int) -> str:
    """A process of this host that no later one is taken for: the boot, the process id, the tick in which it started."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{boot}:{pid}:{started}"


def is_alive(name: str) -> bool:
    """Whether the process of this name runs."""
    pid = name.split(":")[1] if name.count(":") == 2 else ""
    try:
        return pid.isdigit() and process_name(int(pid)) == name
    except OSError:
        return False


def mark_of(home: Path, run_id: UUID) -> Path:
    """The file of a run in its actor's home."""
    return home / "runs" / str(run_id)


def is_at_work(mark: Path) -> bool:
    """Whether a process is at work on the run of this file."""
    return is_alive(_name_in(mark))


def forget_ended(home: Path) -> None:
    """Remove what killed processes left in a home."""
    for mark in (home / "runs").glob("*"):
        if not is_at_work(mark):
            mark.unlink(missing_ok=True)


@contextmanager
def alone_at(mark: Path) -> Iterator[None]:
    """Be the only process at work on a run.

    Another one is killed: what it did is done, and done once, and the server has given its run out again.
    """
    file = None
    with suppress(OSError):  # a full disk: the step itself says so, and what two processes do is still done once
        file = _hold(mark)
    try:
        yield
    finally:
        if file is not None:
            mark.unlink(missing_ok=True)
            file.close()


def _hold(mark: Path) -> IO[str]:
    mark.parent.mkdir(mode=0o700, exist_ok=True)
    while True:
        file = mark.open("a+")
        _lock(file, mark)
        with suppress(FileNotFoundError):  # whoever held it has removed it meanwhile
            if os.path.samestat(os.fstat(file.fileno()), mark.stat()):
                break
        file.close()
    file.truncate(0)
    file.write(process_name(os.getpid()))
    file.flush()
    return file


def _lock(file: IO[str], mark: Path) -> None:
    """Lock the file as soon as its holder has ended, which is killed. A lock of this kind is not inherited by a child."""
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            _kill(_name_in(mark))
        time.sleep(POLL_S)


def _kill(name: str) -> None:
    if not is_alive(name):
        return
    with suppress(ProcessLookupError):
        process = os.pidfd_open(int(name.split(":")[1]))
        try:
            if is_alive(name):  # from here on the number is this process's, whatever ends
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


def _name_in(mark: Path) -> str:
    try:
        return mark.read_text()
    except OSError:
        return ""
