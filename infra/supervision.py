"""The processes of a stack under supervisord: written down, started, asked after, ended exactly.

    FOLDER/supervisord.conf    the programs with their environments, secrets among them: mode 0600
    FOLDER/supervisord.sock    where supervisord is spoken to, by its owner only; .pid and .log beside it
    FOLDER/logs/NAME.log       what a program says; turned over at LOG_BYTES, LOG_FILES are kept

Every process carries MARK with the folder's path in its environment, and so do those that it starts itself. That, not a pid
in a file, says what belongs to a stack: after a power cut of supervisord alone its orphans are found, and nobody else is hit.
"""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

MARK = "HEALCHAIN_STACK"
LOG_BYTES, LOG_FILES = 5 * 2**20, 3
SHOWN_LINES = 30
STOP_S = 20
# A program that ends is started again at once, then after 1, 2, 3... s; after so many in a row it is given up.
RESTARTS = 20
# While it is waited for, it is given up sooner: what it lacks is to be seen in its log.
PATIENCE_STARTS = 2
LONGEST_SOCKET = 107  # bytes of a Unix socket's path, on Linux
STATES_UP = ("STARTING", "RUNNING", "BACKOFF")
# What a program may find of the environment of whoever starts the stack.
INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")


class PartFailed(RuntimeError):
    """A part of the stack did not become ready; the message has the last lines of its log."""


@dataclass(frozen=True)
class Program:
    """One process. command: never a secret in it; environment: secrets go here.

    port: where it listens on the loopback, if it does. stop_signal: what makes it end in order.
    """

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    port: int | None = None
    stop_signal: str = "TERM"


@dataclass(frozen=True)
class Status:
    """How a program is: supervisord's word for its state; pid 0 and uptime 0 when it does not run.

    started_s: unix seconds of its last start, 0 before the first.
    """

    name: str
    state: str
    pid: int
    uptime_s: float
    started_s: int
    said: str


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One command at a time starts or ends this stack. Raises ValueError when another is at it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--folder {folder}: another command starts or ends this stack; wait for it") from error
        yield


def write_programs(folder: Path, programs: list[Program]) -> None:
    """supervisord's file for these programs, first what the others need: they end in the opposite order.

    None starts by itself, but each is started again when it ends.
    """
    socket = folder / "supervisord.sock"
    if (excess := len(os.fsencode(socket)) - LONGEST_SOCKET) > 0:
        raise ValueError(f"--folder {folder}: {excess} bytes too long for the path of a Unix socket in it")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    sections = [_supervisord(folder, socket), *(_section(folder, *placed) for placed in enumerate(programs))]
    write_private(folder / "supervisord.conf", "\n".join(sections))


def _supervisord(folder: Path, socket: Path) -> str:
    return f"""[unix_http_server]
file = {_plain(socket)}
chmod = 0600

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisord]
directory = {_plain(folder)}
pidfile = {_plain(folder / "supervisord.pid")}
logfile = {_plain(folder / "supervisord.log")}
logfile_maxbytes = {LOG_BYTES}
logfile_backups = {LOG_FILES}
childlogdir = {_plain(folder / "logs")}
minfds = 1024
"""


def _section(folder: Path, place: int, program: Program) -> str:
    environment = ",".join(f"{name}={_quoted(value)}" for name, value in sorted(program.environment.items()))
    return f"""[program:{program.name}]
command = {" ".join(_quoted(part) for part in program.command)}
environment = {environment}
priority = {place}
autostart = false
autorestart = true
startsecs = 1
startretries = {RESTARTS}
stopsignal = {program.stop_signal}
stopwaitsecs = {STOP_S}
killasgroup = true
redirect_stderr = true
stdout_logfile = {_plain(folder / "logs" / f"{program.name}.log")}
stdout_logfile_maxbytes = {LOG_BYTES}
stdout_logfile_backups = {LOG_FILES}
"""


def _plain(value: object) -> str:
    """A value of supervisord's file. Raises ValueError for what it cannot hold."""
    text = str(value)
    if re.search(r"[\x00-\x1f;\"'\\]", text):
        raise ValueError(f"{text!r}: quotes, semicolons, backslashes and line breaks cannot be passed to a program")
    return text.replace("%", "%%")


def _quoted(value: str) -> str:
    return f'"{_plain(value)}"'


def clear(folder: Path) -> None:
    """After a power cut, of supervisord alone or of everything: end what lives on without it, remove what says that it runs."""
    if not is_running(folder):
        end_orphans(folder)
        for stale in ("supervisord.sock", "supervisord.pid"):
            (folder / stale).unlink(missing_ok=True)


def start(folder: Path) -> None:
    """supervisord for this folder, running, with the programs as written; what was changed or taken out is ended."""
    if not is_running(folder):
        kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
        command = [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(folder / "supervisord.conf")]
        environment = {**kept, MARK: str(folder), "HOME": str(folder)}
        began = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if began.returncode:
            raise PartFailed(f"supervisord did not start: {(began.stderr or began.stdout).strip()}")
        wait_for("supervisord", lambda: is_running(folder), 10, lambda: _tail(folder / "supervisord.log"))
    _load(folder)


def _load(folder: Path) -> None:
    supervisor = _supervisor(folder)
    added, changed, removed = supervisor.reloadConfig()[0]
    for name in [*changed, *removed]:
        with suppress(xmlrpc.client.Fault):  # it was not running
            supervisor.stopProcessGroup(name)
        supervisor.removeProcessGroup(name)
    for name in [*added, *changed]:
        supervisor.addProcessGroup(name)


def run(folder: Path, name: str) -> None:
    """Have a program running; one that runs is left alone."""
    if state_of(folder, name) not in STATES_UP:
        _supervisor(folder).startProcess(name, False)


def await_ready(folder: Path, name: str, is_ready: Callable[[], bool], within_s: float) -> None:
    """Return when the part answers. Raises PartFailed when it has not in time, or ends again and again."""
    starts = set()

    def check() -> bool:
        now = next(one for one in statuses(folder) if one.name == name)
        starts.add(now.started_s)
        if now.state in ("FATAL", "EXITED", "STOPPED") or len(starts - {0}) > PATIENCE_STARTS:
            raise PartFailed(f"{name} ends at its start ({now.state}: {now.said}).\n{tail(folder, name)}")
        return is_ready()

    wait_for(name, check, within_s, lambda: tail(folder, name))


def wait_for(name: str, is_ready: Callable[[], bool], within_s: float, last_words: Callable[[], str]) -> None:
    deadline = time.monotonic() + within_s
    while not is_ready():
        if time.monotonic() > deadline:
            raise PartFailed(f"{name} is not ready after {within_s:.0f} s. The last lines of its log:\n{last_words()}")
        time.sleep(0.1)


def statuses(folder: Path) -> list[Status]:
    """Every program, in the order in which they start; none when supervisord does not run."""
    if not is_running(folder):
        return []
    known = sorted(_supervisor(folder).getAllConfigInfo(), key=lambda one: int(one["group_prio"]))
    place = {one["name"]: number for number, one in enumerate(known)}
    found = [
        Status(
            name=one["name"],
            state=one["statename"],
            pid=one["pid"],
            uptime_s=max(0, one["now"] - one["start"]) if one["pid"] else 0,
            started_s=one["start"],
            said=one["spawnerr"] or one["description"],
        )
        for one in _supervisor(folder).getAllProcessInfo()
    ]
    return sorted(found, key=lambda one: place[one.name])


def state_of(folder: Path, name: str) -> str:
    return next((one.state for one in statuses(folder) if one.name == name), "")


def restart(folder: Path, name: str) -> None:
    """End a program in order and start it again. Raises ValueError when there is none of this name."""
    names = [one.name for one in statuses(folder)]
    if name not in names:
        known = ", ".join(names) or "nothing: healchain stack up starts it"
        raise ValueError(f"{name}: no such part of the stack in {folder}; there is {known}")
    supervisor = _supervisor(folder)
    with suppress(xmlrpc.client.Fault):  # it was not running
        supervisor.stopProcess(name)
    supervisor.startProcess(name)


def stop(folder: Path) -> list[int]:
    """End every process of the stack, in order where that works. Returns the pids that it had.

    Raises PartFailed when one is left.
    """
    had = sorted(processes_of(folder))
    if is_running(folder):
        with suppress(OSError, xmlrpc.client.Error):
            _supervisor(folder).shutdown()
        deadline = time.monotonic() + 2 * STOP_S
        while processes_of(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
    end_orphans(folder)
    return had


def end_orphans(folder: Path) -> None:
    """Kill what is left of a stack whose supervisord died. Raises PartFailed when something does not end."""
    deadline = time.monotonic() + STOP_S
    while left := processes_of(folder):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise PartFailed(f"processes {', '.join(map(str, sorted(left)))} of {folder} do not end")
        time.sleep(0.05)


def processes_of(folder: Path) -> dict[int, str]:
    """Pid and command of every living process of the stack in this folder, supervisord included."""
    mark = os.fsencode(f"{MARK}={folder}")
    found = {}
    for entry in Path("/proc").iterdir():
        # A process may end while it is looked at, and those of other users do not show their environment.
        with suppress(OSError, ValueError):
            pid = int(entry.name)
            if mark in (entry / "environ").read_bytes().split(b"\0") or _is_database_of(entry, folder):
                found[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    found.pop(os.getpid(), None)
    return found


def _is_database_of(process: Path, folder: Path) -> bool:
    """PostgreSQL's own children write their title over their environment; they work in the database's folder."""
    with suppress(OSError):
        return (process / "exe").readlink().name == "postgres" and folder in (process / "cwd").readlink().parents
    return False


def is_running(folder: Path) -> bool:
    try:
        return bool(_supervisor(folder).getState()["statename"] == "RUNNING")
    except (OSError, xmlrpc.client.Error):
        return False


def tail(folder: Path, name: str) -> str:
    return _tail(folder / "logs" / f"{name}.log")


def _tail(path: Path) -> str:
    if not path.exists():
        return f"  ({path} is not there)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in [*lines[-SHOWN_LINES:], f"({path})"])


def _supervisor(folder: Path) -> Any:
    transport: Any = SupervisorTransport("", "", f"unix://{folder / 'supervisord.sock'}")
    return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
