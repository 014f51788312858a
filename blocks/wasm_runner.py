"""A WebAssembly module as a program: environment in, one JSON object out, and nothing else of this host.

The contract is that of WASI preview 1 with `_start`: argv and stdin are empty, the input is in the environment (of any size: no
operating system is between), stdout is exactly one JSON object, stderr is a log, and exit code 0 means success. A module gets no
file and no network. It runs under three limits: fuel (about one unit an instruction, the same on every host), memory, and
wall-clock time. Compiling comes before them, in a process of its own with limits of its own: an honest module takes some 30 MB
and 1 s a megabyte, and a malicious one of some kilobytes could take minutes and gigabytes.

Errors: ModuleFailed, whose `reason` says which limit or rule; NoRuntime; ValueError for an environment that cannot be passed.
"""

import hashlib
import json
import math
import os
import re
import resource
import secrets
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import wasmtime

MIB = 2**20
PAGE_BYTES = 65_536
MAX_MODULE_BYTES = 64 * MIB
MAGIC = b"\0asm"
WASI = "wasi_snapshot_preview1"
KEPT_FILES = 4  # of machine code
REFUSED = 3  # exit code of the compiling process for what is no module
TABLES, TABLE_ELEMENTS = 4, 2**17  # of one module, 8 bytes an element, beside its memory
MAX_DEPTH = 26  # of nested lists and objects in an answer: 24 of a tensor in `update`
EXACT_DIGITS = 18  # of an integer in an answer; a longer one is read as a double
TOLD_CHARACTERS = 300  # of the log's end, in an error
REMEDIES = {
    "module": "give a WebAssembly core module for WASI preview 1 that exports _start and memory",
    "compile": "raise its time or memory for compiling, or give it a module with less code",
    "fuel": "raise its fuel, or give it less to compute: fewer epochs, fewer samples",
    "memory": "raise its memory, or give it a smaller model or fewer samples",
    "wall clock": "raise its time, or give it less to compute",
    "output": "a module prints exactly one JSON object of finite numbers, and nothing else, to stdout",
    "trap": "the module is faulty",
    "exit": "the module refused its input",
}
"""What a run can fail of, and what to do. `exit` stands for `exit 1`, `exit 2` and so on."""


class NoRuntime(RuntimeError):
    """There is no WebAssembly runtime on this host."""


class ModuleFailed(RuntimeError):
    """A module gave no result. reason: as in REMEDIES, an exit with its code; log: the end of what it wrote to stderr."""

    def __init__(self, reason: str, detail: str, log: str = "") -> None:
        super().__init__(reason, detail, log)
        self.reason, self.detail, self.log = reason, detail, log

    def __str__(self) -> str:
        remedy = REMEDIES["exit" if self.reason.startswith("exit ") else self.reason]
        said = f". It said: {self.log.strip()[-TOLD_CHARACTERS:]}" if self.log.strip() else ""
        return f"{self.reason}: {self.detail}: {remedy}{said}"


@dataclass(frozen=True)
class Limits:
    """What one run may use, and its compiling.

    fuel: a core burns 10^9 to 10^10 a second; memory_bytes: of the module, not of this process; answer_values: numbers, texts,
    lists and objects in its answer, each up to some 70 bytes here; compile_s, compile_memory_bytes: of the compiling process.
    """

    fuel: int = 200_000_000_000
    memory_bytes: int = 256 * MIB
    wall_clock_s: float = 120.0
    stdout_bytes: int = 64 * MIB
    log_bytes: int = 64 * 1024
    answer_values: int = 4 * MIB
    compile_s: float = 120.0
    compile_memory_bytes: int = 1024 * MIB

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kinds = (int, float) if name.endswith("_s") else (int,)
            if type(value) not in kinds or not 0 < value < 2**63:
                kind = "number" if float in kinds else "integer"
                raise ValueError(f"{name} = {value!r:.60}: expected a positive {kind} below 2^63")


def read_limits(path: Path, default: Limits) -> Limits:
    """The default with what a JSON file says otherwise, if there is one. Raises ValueError naming file and field."""
    if not path.exists():
        return default
    known = {one.name for one in fields(Limits)}
    try:
        found = read_object(path.read_bytes())
        if unknown := sorted(set(found) - known):
            raise ValueError(f"{unknown[0]!r:.60} is no limit; there are {', '.join(sorted(known))}")
        return replace(default, **found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Result:
    """answer: the JSON object; log: the end of what was written to stderr; memory_bytes: the most that the module had."""

    answer: dict[str, Any]
    log: str
    fuel_used: int
    memory_bytes: int
    seconds: float


def run(module: bytes, environment: Mapping[str, str], limits: Limits | None = None, *, kept: Path) -> Result:
    """Run a module once. Raises ModuleFailed, NoRuntime or ValueError.

    kept: a folder that only this user can write, where machine code stays from run to run.
    """
    check_environment(environment)
    limits = limits or Limits()
    sandbox = _prepared(module, environment, limits, kept)
    try:
        return sandbox.run()
    finally:
        sandbox.close()


def _prepared(module: bytes, environment: Mapping[str, str], limits: Limits, kept: Path) -> "_Sandbox":
    code = compiled(module, limits, kept=kept)
    try:
        return _Sandbox(code, environment, limits)
    except _runtime().WasmtimeError:  # it was made for another processor, or forgotten just now
        code.unlink(missing_ok=True)
        return _Sandbox(compiled(module, limits, kept=kept), environment, limits)


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise ValueError naming a variable that cannot be passed."""
    for name, value in environment.items():
        if not name or "=" in name or "\0" in name or "\0" in value or not _is_unicode(name + value):
            raise ValueError(
                f"environment variable {name!r}: expected a name without '=', no zero byte, and no half of a character"
            )


def _is_unicode(text: str) -> bool:
    """JSON can write halves of surrogate pairs, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_object(data: bytes, *, max_values: int = Limits.answer_values, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """A JSON object that can be written again in any format: numbers of double precision, and bounded.

    Raises ValueError, whose text repeats nothing of the data.
    """
    # Counted before it is read, commas within texts as well: three bytes of JSON can become seventy of memory.
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > max_values:
        raise ValueError(f"it has up to {values} values, at most {max_values} are read")
    if _depth(data) > max_depth:  # before it is read: where a library has raised Python's bound, the reader would crash
        raise ValueError(f"its lists and objects are nested more than {max_depth} deep")
    found = json.loads(data, parse_constant=_no_constant, parse_float=_double, parse_int=_integer)
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}, no object")
    _check_texts(found)
    return found


def _depth(data: bytes) -> int:
    """How deep lists and objects are nested, at least, in what may be JSON."""
    brackets = _TEXT.sub(b"", data).translate(None, _NO_BRACKETS)
    return max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)


_TEXT = re.compile(rb'(?s)"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _double(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"a number of {len(text)} characters is beyond double precision")
    return number


def _integer(text: str) -> int | float:
    return int(text) if len(text) <= EXACT_DIGITS else _double(text)


def _check_texts(value: Any) -> None:
    if isinstance(value, (dict, list)):
        for inner in value if isinstance(value, list) else (*value, *value.values()):
            _check_texts(inner)
    elif isinstance(value, str) and not _is_unicode(value):
        raise ValueError("a text in it has half of a character")


def compiled(module: bytes, limits: Limits | None = None, *, kept: Path) -> Path:
    """A file of the folder `kept` with the module's machine code; it is made when there is none that is whole and our own.

    Raises ModuleFailed, NoRuntime, or ValueError for a folder where others can write.
    """
    version = f"{_runtime().__name__}{metadata.version('wasmtime')}"
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_own(kept.stat()):
        raise ValueError(f"{kept}: others can write there, and machine code in it would be run: chmod 700 {kept}")
    if len(module) > MAX_MODULE_BYTES:
        raise ModuleFailed("module", f"it has {len(module)} bytes, at most {MAX_MODULE_BYTES} are compiled")
    name = f"{hashlib.sha256(module).hexdigest()}-{version}"
    for path in kept.glob(f"{name}-*"):
        with suppress(FileNotFoundError):  # another process has forgotten it meanwhile
            if _is_own(path.lstat()) and _sha256(path) == path.name.rpartition("-")[2]:
                return path
            path.unlink()
    draft = kept / f".{secrets.token_hex(8)}"
    try:
        _compile_elsewhere(module, draft, limits or Limits())
        path = kept / f"{name}-{_sha256(draft)}"
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _forget_old(kept)
    return path


def _is_own(found: os.stat_result) -> bool:
    """A file or folder that nobody else could have written."""
    return found.st_uid == os.getuid() and not found.st_mode & 0o022 and not stat.S_ISLNK(found.st_mode)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _forget_old(kept: Path) -> None:
    """Leave the newest files, and drafts of today: other processes may make or forget some at the same time."""
    ages, today = [], time.time() - 86_400
    for path in kept.iterdir():
        with suppress(FileNotFoundError):
            written_s = path.stat().st_mtime
            if not path.name.startswith("."):
                ages.append((written_s, path))
            elif written_s < today:  # left by a kill
                path.unlink()
    for _, path in sorted(ages)[:-KEPT_FILES]:
        path.unlink(missing_ok=True)


def _compile_elsewhere(module: bytes, draft: Path, limits: Limits) -> None:
    """Have a process of its own write machine code. Raises ModuleFailed."""
    seconds, size = limits.compile_s, limits.compile_memory_bytes
    command = [sys.executable, "-m", "blocks.wasm_runner", str(draft), str(math.ceil(seconds)), str(size)]
    too_long = f"compiling took more than {seconds:g} s"
    try:
        done = subprocess.run(
            command, input=module, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModuleFailed("compile", too_long) from None
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode == REFUSED:
        raise ModuleFailed("module", said)
    if done.returncode == -signal.SIGXCPU:
        raise ModuleFailed("compile", too_long)
    if done.returncode != 0:
        raise ModuleFailed("compile", f"its compiler ended with {done.returncode}, having {size} bytes of memory", said)


def _compile(draft: str, seconds: str, size: str) -> None:
    """The program of that process: a module from stdin into a file, under limits that it gives itself."""
    os.umask(0o077)
    # The processor's time also ends what the caller, killed, cannot end; a dump of such a process would be its size.
    for kind, bound in (
        (resource.RLIMIT_CPU, int(seconds)),
        (resource.RLIMIT_AS, int(size)),
        (resource.RLIMIT_FSIZE, int(size)),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, hard))
    try:
        code = _machine_code(sys.stdin.buffer.read())
    except ModuleFailed as failed:
        sys.stderr.write(failed.detail)
        sys.exit(REFUSED)
    Path(draft).write_bytes(code)


def _machine_code(module: bytes) -> bytes:
    """Of a module that can be started. Raises ModuleFailed."""
    runtime = _runtime()
    if not module.startswith(MAGIC):
        raise ModuleFailed("module", f"it begins with {module[:4]!r}, a module begins with {MAGIC!r}")
    try:
        made = runtime.Module(_engine(), module)
    except runtime.WasmtimeError as error:
        raise ModuleFailed("module", _cause(error)) from error
    exports = {export.name: export.type for export in made.exports}
    start = exports.get("_start")
    if not isinstance(start, runtime.FuncType) or start.params or start.results:
        raise ModuleFailed("module", "it exports no function _start without parameters and results")
    if not isinstance(exports.get("memory"), runtime.MemoryType):
        raise ModuleFailed("module", "it exports no memory")
    foreign = sorted({one.module for one in made.imports} - {WASI})
    if foreign:
        raise ModuleFailed("module", f"it imports from {', '.join(foreign[:5])}, and there is nothing but {WASI}")
    return bytes(made.serialize())


def _runtime() -> Any:
    try:
        import wasmtime
    except ImportError as error:
        raise NoRuntime("there is no wasmtime on this host: pip install 'healchain[edge]'") from error
    return wasmtime


def _engine() -> "wasmtime.Engine":
    """An engine for one run: when its epoch advances, what runs in it ends."""
    runtime = _runtime()
    config = runtime.Config()
    config.consume_fuel = True
    config.epoch_interruption = True
    config.parallel_compilation = False
    # The same bits on every processor.
    config.cranelift_nan_canonicalization = True
    config.wasm_relaxed_simd_deterministic = True
    # Memory of these kinds would not count towards the limit.
    config.wasm_threads = False
    config.wasm_gc = False
    engine: wasmtime.Engine = runtime.Engine(config)
    return engine


class _Sandbox:
    """One run: an instance, its output so far, and what ended it early."""

    def __init__(self, code: Path, environment: Mapping[str, str], limits: Limits) -> None:
        runtime = _runtime()
        self.limits, self.ended_by, self.memory_bytes, self.is_complete = limits, "", 0, False
        self.stdout, self.log = bytearray(), bytearray()
        self.ends_s = time.monotonic() + limits.wall_clock_s
        self.engine = _engine()
        self.module = runtime.Module.deserialize_file(self.engine, str(code))
        self.store = runtime.Store(self.engine)
        self.store.set_wasi(self._wasi(environment))
        self.linker = runtime.Linker(self.engine)
        self.linker.define_wasi()
        self._define_own()
        self.store.set_fuel(limits.fuel)
        self.store.set_epoch_deadline(1)
        self.store.set_limits(
            memory_size=limits.memory_bytes, table_elements=TABLE_ELEMENTS, instances=1, tables=TABLES, memories=1
        )

    def run(self) -> Result:
        """Raises ModuleFailed."""
        runtime, begun_s = _runtime(), time.monotonic()
        alarm = threading.Timer(self.ends_s - begun_s, self._end, ["wall clock"])
        alarm.start()
        try:
            self._start()
        except runtime.ExitTrap as left:
            if left.code != 0:
                self._fail(f"exit {left.code}", f"exit code {left.code}")
        except runtime.Trap as trap:
            self._fail("fuel" if trap.trap_code is runtime.TrapCode.OUT_OF_FUEL else "trap", _cause(trap))
        except runtime.WasmtimeError as error:  # of what it asked the host for, such as exit code 126
            self._fail("trap" if self.is_complete else "module", _cause(error))
        finally:
            alarm.cancel()
            alarm.join()
        if self.ended_by:  # just as it returned by itself
            self._fail("trap", "")
        used = self.limits.fuel - self.store.get_fuel()
        return Result(self._answer(), self._log_text(), used, self.memory_bytes, time.monotonic() - begun_s)

    def close(self) -> None:
        for part in (self.linker, self.store, self.module, self.engine):
            part.close()

    def _start(self) -> None:
        """Instantiate, which runs a start function of the module, and call `_start`."""
        memory = next(one.type for one in self.module.exports if one.name == "memory")
        if memory.limits.min * PAGE_BYTES > self.limits.memory_bytes:
            self._fail("memory", f"it begins with {memory.limits.min * PAGE_BYTES} bytes of {self.limits.memory_bytes}")
        exports = self.linker.instantiate(self.store, self.module).exports(self.store)
        self.is_complete = True
        try:
            exports["_start"](self.store)
        finally:
            self.memory_bytes = exports["memory"].data_len(self.store)

    def _end(self, reason: str) -> None:
        """End the run at its next branch or call."""
        self.ended_by = self.ended_by or reason
        self.engine.increment_epoch()

    def _fail(self, reason: str, detail: str) -> NoReturn:
        limits = self.limits
        # The runtime answers a refused growth with -1, and leaves the rest to the module: it exits, traps or goes on.
        at_fault = reason == "trap" or reason.startswith("exit ")
        if at_fault and limits.memory_bytes - self.memory_bytes < limits.memory_bytes // 16:
            reason, detail = "memory", f"{self.memory_bytes} of {limits.memory_bytes} bytes were in use, then {detail}"
        if self.ended_by:
            reason, detail = self.ended_by, {
                "wall clock": f"it ran for more than {limits.wall_clock_s:g} s",
                "output": f"it wrote more than {limits.stdout_bytes} bytes to stdout",
            }[self.ended_by]  # fmt: skip
        if reason == "fuel":
            detail = f"its {limits.fuel} units are used up"
        raise ModuleFailed(reason, detail, self._log_text())

    def _answer(self) -> dict[str, Any]:
        try:
            return read_object(bytes(self.stdout), max_values=self.limits.answer_values)
        except ValueError as error:
            self._fail("output", f"stdout, {len(self.stdout)} bytes, is no JSON object that can be used: {error}")

    def _log_text(self) -> str:
        return bytes(self.log).decode(errors="replace")

    def _wasi(self, environment: Mapping[str, str]) -> "wasmtime.WasiConfig":
        wasi: wasmtime.WasiConfig = _runtime().WasiConfig()
        wasi.argv = []
        wasi.env = list(environment.items())
        return wasi

    def _take_stdout(self, data: bytes) -> None:
        if len(self.stdout) + len(data) > self.limits.stdout_bytes:
            self._end("output")
        else:
            self.stdout += data

    def _take_log(self, data: bytes) -> None:
        self.log += data
        del self.log[: -self.limits.log_bytes]

    def _define_own(self) -> None:
        """Two functions of WASI anew.

        In the runtime's poll_oneoff a module could sleep far beyond its time. Its fd_write hands what was written to Python on
        a thread of its own, which aborts this process when it is at work while the interpreter ends.
        """
        runtime, i32 = _runtime(), _runtime().ValType.i32()
        self.linker.allow_shadowing = True
        kind = runtime.FuncType([i32, i32, i32, i32], [i32])
        self.linker.define_func(WASI, "poll_oneoff", kind, self._sleep, access_caller=True)
        self.linker.define_func(WASI, "fd_write", kind, self._write, access_caller=True)

    def _write(self, caller: Any, descriptor: int, pieces_at: int, count: int, written_at: int) -> int:
        """Take pieces of the memory, the first of them if they are very many, to stdout or stderr. An error code, or 0."""
        take = {1: self._take_stdout, 2: self._take_log}.get(descriptor)
        if take is None:
            return _BAD_DESCRIPTOR
        memory, written = _Memory(caller), 0
        try:
            for place in range(pieces_at, pieces_at + min(count % 2**32, MAX_PIECES) * _PIECE.size, _PIECE.size):
                at, size = _PIECE.unpack(memory.read(place, _PIECE.size))
                for begin in range(at, at + size, MIB):
                    if self.ended_by:  # the pieces can be as many times the whole memory
                        return 0
                    take(memory.read(begin, min(MIB, at + size - begin)))
                written += size
            memory.write(written_at, struct.pack("<I", written % 2**32))
        except IndexError:
            return _BAD_ADDRESS
        return 0

    def _sleep(self, caller: Any, waits_at: int, events_at: int, count: int, count_at: int) -> int:
        """Sleep until the first of some clocks, at most to the end of the run; one event for it. An error code, or 0."""
        memory = _Memory(caller)
        try:
            places = range(waits_at, waits_at + min(count, MAX_WAITS) * _WAIT.size, _WAIT.size)
            waits = [_WAIT.unpack(memory.read(place, _WAIT.size)) for place in places]
            if not waits or any(kind != _CLOCK or flags != 0 for _, kind, _, _, flags in waits):
                return _NOT_SUPPORTED
            named, shortest_ns = min(((name, wait_ns) for name, _, wait_ns, _, _ in waits), key=lambda wait: wait[1])
            time.sleep(max(0.0, min(shortest_ns / 1e9, self.ends_s - time.monotonic())))
            memory.write(events_at, _EVENT.pack(named, 0, _CLOCK))
            memory.write(count_at, struct.pack("<I", 1))
        except IndexError:
            return _BAD_ADDRESS
        return 0


# Of WASI preview 1: a subscription to a clock (user data, kind, relative time in ns, precision, flags), and its event.
_WAIT = struct.Struct("<QB7x8xQQH6x")
_EVENT = struct.Struct("<QHB5x16x")
_CLOCK = 0
_PIECE = struct.Struct("<II")  # a piece of what is written: its address and size
_BAD_DESCRIPTOR, _BAD_ADDRESS, _NOT_SUPPORTED = 8, 21, 58
MAX_WAITS = 64
MAX_PIECES = 1024  # of one write; the caller writes the rest in the next


class _Memory:
    """The memory of the module that calls, with addresses as unsigned numbers. Raises IndexError outside of it."""

    def __init__(self, caller: Any) -> None:
        self.caller, self.memory = caller, caller["memory"]

    def read(self, at: int, size: int) -> bytes:
        return bytes(self.memory.read(self.caller, *self._span(at, size)))

    def write(self, at: int, data: bytes) -> None:
        self.memory.write(self.caller, data, self._span(at, len(data))[0])

    def _span(self, at: int, size: int) -> tuple[int, int]:
        begin = at % 2**32
        if begin + size > self.memory.data_len(self.caller):
            raise IndexError(f"{size} bytes at {begin}: outside of the memory")
        return begin, begin + size


def _cause(error: Exception) -> str:
    """The innermost cause that the runtime names, in one line."""
    causes = [line.strip() for line in str(error).splitlines() if line.strip()]
    return causes[-1][:200] if causes else type(error).__name__


if __name__ == "__main__":
    _compile(*sys.argv[1:])
