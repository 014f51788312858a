"""A WebAssembly module as a program: environment in, one JSON object out, and nothing else of this host.

The contract is that of WASI preview 1 with `_start`: argv and stdin are empty, the input is in the environment (of any size: no
operating system is between), stdout is exactly one JSON object, stderr is a log, and exit code 0 means success. A module gets no
file and no network. It runs under three limits: fuel (about one unit an instruction, the same on every host), memory, and
wall-clock time. Compiling comes before them: it is bounded by the module's size alone, some 30 MB of memory and 1 s a megabyte.

Errors: ModuleFailed, whose `reason` says which limit or rule; NoRuntime; ValueError for an environment that cannot be passed.
"""

import hashlib
import json
import os
import secrets
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
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
TOLD_CHARACTERS = 300  # of the log's end, in an error
REMEDIES = {
    "module": "give a WebAssembly core module for WASI preview 1 that exports _start and memory",
    "fuel": "raise its fuel, or give it less to compute: fewer epochs, fewer samples",
    "memory": "raise its memory, or give it a smaller model or fewer samples",
    "wall clock": "raise its time, or give it less to compute",
    "output": "a module prints exactly one JSON object, and nothing else, to stdout",
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
    """What one run may use. fuel: a core burns 10^9 to 10^10 a second; memory_bytes: of the module, not of this process."""

    fuel: int = 200_000_000_000
    memory_bytes: int = 256 * MIB
    wall_clock_s: float = 120.0
    stdout_bytes: int = 64 * MIB
    log_bytes: int = 64 * 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < 2**63:
                raise ValueError(f"{name} = {value}: expected a positive number below 2^63")


@dataclass(frozen=True)
class Result:
    """answer: the JSON object; log: the end of what was written to stderr; memory_bytes: the most that the module had."""

    answer: dict[str, Any]
    log: str
    fuel_used: int
    memory_bytes: int
    seconds: float


def run(
    module: bytes, environment: Mapping[str, str], limits: Limits | None = None, *, kept: Path | None = None
) -> Result:
    """Run a module once. Raises ModuleFailed, NoRuntime or ValueError.

    kept: a folder that only this user can write, where machine code stays from run to run; another process makes it, so that
    this one never needs the compiler's memory. Without it, this process compiles and remembers.
    """
    check_environment(environment)
    sandbox = _prepared(_Named.of(module), environment, limits or Limits(), kept)
    try:
        return sandbox.run()
    finally:
        sandbox.close()


def _prepared(module: "_Named", environment: Mapping[str, str], limits: Limits, kept: Path | None) -> "_Sandbox":
    if kept is None:
        return _Sandbox(_compiled(module), environment, limits)
    code = _kept(module, kept)
    try:
        return _Sandbox(code, environment, limits)
    except _runtime().WasmtimeError:  # it was made for another processor
        code.unlink()
        return _Sandbox(_kept(module, kept), environment, limits)


def check_module(module: bytes) -> None:
    """Return if the module can be started. Raises ModuleFailed or NoRuntime."""
    _compiled(_Named.of(module))


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise ValueError naming a variable that cannot be passed."""
    for name, value in environment.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise ValueError(f"environment variable {name!r}: expected a name without '=', and no zero byte")


@dataclass(frozen=True)
class _Named:
    """Bytes that are compared by their digest."""

    sha256: str
    data: bytes = field(compare=False, repr=False)

    @classmethod
    def of(cls, data: bytes) -> "_Named":
        return cls(hashlib.sha256(data).hexdigest(), data)


@lru_cache(maxsize=4)
def _compiled(module: _Named) -> bytes:
    """The module's machine code. Raises ModuleFailed or NoRuntime."""
    data, runtime = module.data, _runtime()
    if len(data) > MAX_MODULE_BYTES:
        raise ModuleFailed("module", f"it has {len(data)} bytes, at most {MAX_MODULE_BYTES} are compiled")
    if not data.startswith(MAGIC):
        raise ModuleFailed("module", f"it begins with {data[:4]!r}, a module begins with {MAGIC!r}")
    try:
        compiled = runtime.Module(_engine(), data)
    except runtime.WasmtimeError as error:
        raise ModuleFailed("module", _cause(error)) from error
    exports = {export.name: export.type for export in compiled.exports}
    start = exports.get("_start")
    if not isinstance(start, runtime.FuncType) or start.params or start.results:
        raise ModuleFailed("module", "it exports no function _start without parameters and results")
    if not isinstance(exports.get("memory"), runtime.MemoryType):
        raise ModuleFailed("module", "it exports no memory")
    foreign = sorted({one.module for one in compiled.imports} - {WASI})
    if foreign:
        raise ModuleFailed("module", f"it imports from {', '.join(foreign[:5])}, and there is nothing but {WASI}")
    return bytes(compiled.serialize())


def _kept(module: _Named, folder: Path) -> Path:
    """A file with the module's machine code, named by the digests of both; it is made when there is none that is whole."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise ValueError(f"{folder}: others can write there, and machine code in it would be run: chmod 700 {folder}")
    version = f"{_runtime().__name__}{metadata.version('wasmtime')}"
    for path in folder.glob(f"{module.sha256}-{version}-*"):
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == path.name.rpartition("-")[2]:
                return path
        path.unlink()
    code = _compiled_elsewhere(module.data)
    path = folder / f"{module.sha256}-{version}-{hashlib.sha256(code).hexdigest()}"
    draft = folder / f".{secrets.token_hex(8)}"
    draft.touch(0o600)
    draft.write_bytes(code)
    draft.replace(path)
    for old in sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime_ns)[:-KEPT_FILES]:
        old.unlink()
    return path


def _compiled_elsewhere(module: bytes) -> bytes:
    """Machine code made by a process of its own. Raises ModuleFailed."""
    done = subprocess.run([sys.executable, "-m", "blocks.wasm_runner"], input=module, capture_output=True)
    if done.returncode == REFUSED:
        raise ModuleFailed("module", done.stderr.decode(errors="replace"))
    if done.returncode != 0:
        raise ModuleFailed("module", f"the compiler ended with {done.returncode}: {done.stderr[-TOLD_CHARACTERS:]!r}")
    return done.stdout


def _compile_stdin() -> None:
    """The program of that process: a module in, machine code out."""
    try:
        sys.stdout.buffer.write(_compiled(_Named.of(sys.stdin.buffer.read())))
    except ModuleFailed as failed:
        sys.stderr.write(failed.detail)
        sys.exit(REFUSED)


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

    def __init__(self, compiled: bytes | Path, environment: Mapping[str, str], limits: Limits) -> None:
        runtime = _runtime()
        self.limits, self.ended_by, self.memory_bytes = limits, "", 0
        self.stdout, self.log = bytearray(), bytearray()
        self.ends_s = time.monotonic() + limits.wall_clock_s
        self.engine = _engine()
        if isinstance(compiled, Path):
            self.module = runtime.Module.deserialize_file(self.engine, str(compiled))
        else:
            self.module = runtime.Module.deserialize(self.engine, compiled)
        self.store = runtime.Store(self.engine)
        self.store.set_wasi(self._wasi(environment))
        self.linker = runtime.Linker(self.engine)
        self.linker.define_wasi()
        self._define_sleep()
        self.store.set_fuel(limits.fuel)
        self.store.set_epoch_deadline(1)
        self.store.set_limits(memory_size=limits.memory_bytes, table_elements=MIB, instances=1, tables=16, memories=1)

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
        except runtime.WasmtimeError as error:
            self._fail("module", _cause(error))
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
            answer = json.loads(bytes(self.stdout), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            self._fail("output", f"stdout, {len(self.stdout)} bytes, is no JSON: {error}")
        if not isinstance(answer, dict):
            self._fail("output", f"stdout is a JSON {type(answer).__name__}, no object")
        return answer

    def _log_text(self) -> str:
        return bytes(self.log).decode(errors="replace")

    def _wasi(self, environment: Mapping[str, str]) -> "wasmtime.WasiConfig":
        wasi: wasmtime.WasiConfig = _runtime().WasiConfig()
        wasi.argv = []
        wasi.env = list(environment.items())
        wasi.stdout_custom = self._take_stdout
        wasi.stderr_custom = self._take_log
        return wasi

    def _take_stdout(self, data: bytes) -> None:
        if len(self.stdout) + len(data) > self.limits.stdout_bytes:
            self._end("output")
        else:
            self.stdout += data

    def _take_log(self, data: bytes) -> None:
        self.log += data
        del self.log[: -self.limits.log_bytes]

    def _define_sleep(self) -> None:
        """WASI's sleep (poll_oneoff) anew: in the runtime's own, a module could sleep far beyond its time."""
        runtime, i32 = _runtime(), _runtime().ValType.i32()
        self.linker.allow_shadowing = True
        kind = runtime.FuncType([i32, i32, i32, i32], [i32])
        self.linker.define_func(WASI, "poll_oneoff", kind, self._sleep, access_caller=True)

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
_BAD_ADDRESS, _NOT_SUPPORTED = 21, 58
MAX_WAITS = 64


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


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _cause(error: Exception) -> str:
    """The innermost cause that the runtime names, in one line."""
    causes = [line.strip() for line in str(error).splitlines() if line.strip()]
    return causes[-1][:200] if causes else type(error).__name__


if __name__ == "__main__":
    _compile_stdin()
