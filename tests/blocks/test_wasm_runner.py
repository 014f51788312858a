"""A module gets its environment and nothing else, answers one JSON object, and never outlives its limits."""

import concurrent.futures
import gc
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import wasmtime

from blocks import wasm_runner
from blocks.wasm_runner import MIB, Limits, ModuleFailed, NoRuntime, Result, read_limits, read_object

# Imports of the modules below; `say` writes bytes of the memory to stdout (1) or stderr (2).
WASI = """
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_prestat_get" (func $fd_prestat_get (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 1024) "{\\"a\\":1}")
  (data (i32.const 2048) "a word for the log\\n")
  (func $say (param $to i32) (param $at i32) (param $size i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $size))
    (drop (call $fd_write (local.get $to) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func $answer (call $say (i32.const 1) (i32.const 1024) (i32.const 7)))
  (func $log (call $say (i32.const 2) (i32.const 2048) (i32.const 19)))
"""


_kept: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where these tests' machine code is."""
    _kept.append(tmp_path_factory.mktemp("compiled"))
    yield _kept[-1]
    _kept.clear()


def run(
    code: bytes, environment: Mapping[str, str], limits: Limits | None = None, *, kept: Path | None = None
) -> Result:
    return wasm_runner.run(code, environment, limits, kept=kept or _kept[-1])


def module(body: str) -> bytes:
    """A module whose _start is `body`."""
    return bytes(wasmtime.wat2wasm(f'(module {WASI} (func (export "_start") {body}))'))


def failure(code: bytes, **limits: float) -> ModuleFailed:
    with pytest.raises(ModuleFailed) as failed:
        run(code, {}, Limits(**{"fuel": 10_000_000, "wall_clock_s": 20.0, **limits}))  # type: ignore[arg-type]
    return failed.value


ANSWERS = module("(call $log) (call $answer)")


def test_an_answer_is_read_with_its_log_and_what_it_used():
    result = run(ANSWERS, {})
    assert result.answer == {"a": 1}
    assert result.log == "a word for the log\n"
    assert result.memory_bytes == 65_536
    assert 0 < result.fuel_used < 1000


def test_the_same_run_uses_the_same_fuel():
    assert run(ANSWERS, {}).fuel_used == run(ANSWERS, {}).fuel_used


def test_an_exit_with_code_zero_is_a_success():
    assert run(module("(call $answer) (call $exit (i32.const 0))"), {}).answer == {"a": 1}


LOOP = "(loop $again (br $again))"


def test_an_endless_loop_ends_with_its_fuel():
    failed = failure(module(LOOP))
    assert failed.reason == "fuel"
    assert "10000000 units" in str(failed)
    assert "fewer epochs" in str(failed)


def test_an_endless_loop_with_much_fuel_ends_with_its_time():
    begun = time.monotonic()
    failed = failure(module(LOOP), fuel=10**15, wall_clock_s=0.3)
    assert failed.reason == "wall clock"
    assert "0.3 s" in str(failed)
    assert time.monotonic() - begun < 5


def test_a_start_function_that_loops_ends_too():
    code = bytes(
        wasmtime.wat2wasm(
            f'(module {WASI} (func $begin {LOOP}) (start $begin) (func (export "_start") (call $answer)))'
        )
    )
    assert failure(code).reason == "fuel"
    assert failure(code, fuel=10**15, wall_clock_s=0.3).reason == "wall clock"


# A subscription to the clock at 512: relative, kind 0, in nanoseconds at 536.
SLEEP = """
  (i64.store (i32.const 512) (i64.const 7)) (i32.store (i32.const 528) (i32.const 1))
  (i64.store (i32.const 536) (i64.const {ns}))
  (if (call $poll (i32.const 512) (i32.const 640) (i32.const 1) (i32.const 700)) (then (call $exit (i32.const 9))))
  (if (i32.ne (i32.load (i32.const 700)) (i32.const 1)) (then (call $exit (i32.const 8))))
  (if (i64.ne (i64.load (i32.const 640)) (i64.const 7)) (then (call $exit (i32.const 7))))
  (call $answer)
"""


def test_a_module_may_sleep():
    begun = time.monotonic()
    assert run(module(SLEEP.format(ns=200_000_000)), {}).answer == {"a": 1}
    assert 0.2 <= time.monotonic() - begun < 5


def test_a_module_that_sleeps_for_an_hour_ends_with_its_time():
    begun = time.monotonic()
    failed = failure(module(f"(loop $again {SLEEP.format(ns=3600 * 10**9)} (br $again))"), wall_clock_s=0.3)
    assert failed.reason == "wall clock"
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("place", ["-1", "65520", "2147483647"])
def test_a_sleep_outside_of_the_memory_is_an_error_for_the_module_alone(place):
    body = f"(call $exit (call $poll (i32.const {place}) (i32.const 640) (i32.const 1) (i32.const 700)))"
    assert failure(module(body)).reason == "exit 21"


def test_output_comes_in_many_pieces_and_nothing_is_left_out():
    """Five pieces, of them one empty and one of more than a mebibyte; the fifth is beyond the memory's end."""
    pieces = "".join(
        f"(i32.store (i32.const {512 + 8 * n}) (i32.const {at})) (i32.store (i32.const {516 + 8 * n}) (i32.const {size}))"
        for n, (at, size) in enumerate([(1024, 5), (1 << 30, 0), (65536, 1_500_000), (1029, 2), (65536, 1 << 30)])
    )
    body = f"(drop (memory.grow (i32.const 32))) (memory.fill (i32.const 65536) (i32.const 0x20) (i32.const 1500000)) {pieces}"
    whole = "(drop (call $fd_write (i32.const 1) (i32.const 512) (i32.const 4) (i32.const 600)))"
    exit_ = "(if (i32.ne (i32.load (i32.const 600)) (i32.const 1500007)) (then (call $exit (i32.const 9))))"
    assert run(module(f"{body} {whole} {exit_}"), {}).answer == {"a": 1}
    beyond = "(call $exit (call $fd_write (i32.const 2) (i32.const 512) (i32.const 5) (i32.const 600)))"
    assert failure(module(f"{body} {beyond}")).reason == "exit 21"


@pytest.mark.parametrize("descriptor", ["0", "3", "-1"])
def test_there_is_nothing_else_to_write_to(descriptor):
    body = f"(call $exit (call $fd_write (i32.const {descriptor}) (i32.const 512) (i32.const 1) (i32.const 600)))"
    assert failure(module(body)).reason == "exit 8"


def test_a_write_of_gigabytes_ends_with_its_time():
    """A thousand pieces that are the same 100 MiB."""
    body = """(local $n i32) (drop (memory.grow (i32.const 1700)))
      (loop $more
        (i32.store (i32.add (i32.const 8192) (i32.mul (local.get $n) (i32.const 8))) (i32.const 65536))
        (i32.store (i32.add (i32.const 8196) (i32.mul (local.get $n) (i32.const 8))) (i32.const 104857600))
        (local.set $n (i32.add (local.get $n) (i32.const 1)))
        (br_if $more (i32.lt_u (local.get $n) (i32.const 1000))))
      (drop (call $fd_write (i32.const 2) (i32.const 8192) (i32.const 1000) (i32.const 512)))"""
    begun = time.monotonic()
    assert failure(module(body), wall_clock_s=0.5).reason == "wall clock"
    assert time.monotonic() - begun < 8


def test_no_thread_is_left_that_the_end_of_this_process_would_abort():
    program = (
        f"from pathlib import Path\nfrom blocks import wasm_runner\n"
        f"wasm_runner.run(bytes.fromhex({ANSWERS.hex()!r}), {{}}, kept=Path({str(_kept[-1])!r}))\n"
        f"print(*sorted(path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.split())) == (0, 1), done.stdout + done.stderr


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_wait_for_nothing_is_refused_to_the_module(count):
    body = f"(call $exit (call $poll (i32.const 512) (i32.const 640) (i32.const {count}) (i32.const 700)))"
    assert failure(module(body)).reason == "exit 58"


BOMB = "(loop $again (br_if $again (i32.ne (memory.grow (i32.const 16)) (i32.const -1))))"


@pytest.mark.parametrize("end", ["unreachable", "(call $exit (i32.const 2))"])
def test_a_memory_bomb_is_named_as_one_whether_it_traps_or_exits(end):
    failed = failure(module(f"{BOMB} {end}"), memory_bytes=64 * MIB)
    assert failed.reason == "memory"
    assert str(64 * MIB) in str(failed)


def test_a_table_bomb_takes_little():
    """As many tables as there may be; the module would exit if the second growth of one succeeded."""
    tables = "".join(f"(table $t{n} 1 funcref)" for n in range(wasm_runner.TABLES))
    grow = "(table.grow $t{n} (ref.null func) (i32.const {size}))"
    body = "".join(
        f"(drop {grow.format(n=n, size=wasm_runner.TABLE_ELEMENTS - 1)})"
        f"(if (i32.ne {grow.format(n=n, size=1)} (i32.const -1)) (then (call $exit (i32.const 9))))"
        for n in range(wasm_runner.TABLES)
    )

    def with_tables(tables: str) -> bytes:
        return bytes(wasmtime.wat2wasm(f'(module {WASI} {tables} (func (export "_start") {body} (call $answer)))'))

    assert run(with_tables(tables), {}).answer == {"a": 1}
    assert "table count" in str(failure(with_tables(tables + "(table 1 funcref)")))
    assert failure(with_tables(tables.replace("$t0 1", "$t0 1000000"))).reason == "module"


def test_memory_that_is_refused_is_never_taken():
    result = run(module(f"{BOMB} (call $answer)"), {}, Limits(memory_bytes=8 * MIB))
    assert result.memory_bytes <= 8 * MIB


def test_a_module_that_begins_beyond_its_memory_is_refused():
    code = bytes(wasmtime.wat2wasm('(module (memory (export "memory") 1024) (func (export "_start")))'))
    assert failure(code, memory_bytes=MIB).reason == "memory"
    assert failure(code, memory_bytes=64 * MIB).reason == "output"


def test_an_output_bomb_is_stopped_at_its_bound():
    failed = failure(module("(loop $again (call $answer) (br $again))"), fuel=10**12, stdout_bytes=100_000)
    assert failed.reason == "output"
    assert "100000 bytes" in str(failed)


def test_a_log_bomb_leaves_the_end_of_the_log():
    body = "(local $n i32) (loop $again (call $log) (local.set $n (i32.add (local.get $n) (i32.const 1))) "
    body += "(br_if $again (i32.lt_u (local.get $n) (i32.const 5000)))) (call $answer)"
    result = run(module(body), {}, Limits(log_bytes=1000))
    assert len(result.log) == 1000
    assert result.log.endswith("a word for the log\n")


def test_a_trap_is_named_with_the_log():
    failed = failure(module("(call $log) unreachable"))
    assert failed.reason == "trap"
    assert "unreachable" in str(failed)
    assert "a word for the log" in str(failed)


def test_endless_recursion_is_a_trap():
    code = bytes(wasmtime.wat2wasm(f'(module {WASI} (func $f (export "_start") (call $f)))'))
    failed = failure(code, fuel=10**9)
    assert failed.reason == "trap"
    assert "stack" in str(failed)


@pytest.mark.parametrize(
    ("text", "reason", "says"),
    [
        ("(call $exit (i32.const 126))", "trap", "exit status"),
        ("(call $exit (i32.const -1))", "trap", "exit status"),
        ("(drop (call $random (i32.const 0) (i32.const -1)))", "trap", "exceeds limit"),
        ("(call $exit (call $random (i32.const 65530) (i32.const 100)))", "trap", "out of bounds"),
        ("(call $exit (call $random (i32.const 0) (i32.const 65536)))", "output", ""),
    ],
)  # fmt: skip
def test_odd_questions_to_the_host_end_the_module_alone(text, reason, says):
    random = '(import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))'
    failed = failure(bytes(wasmtime.wat2wasm(f'(module {random} {WASI} (func (export "_start") {text}))')))
    assert (failed.reason, says in str(failed)) == (reason, True)


@pytest.mark.parametrize("status", [1, 3])
def test_an_exit_code_is_named_with_the_log(status):
    failed = failure(module(f"(call $log) (call $answer) (call $exit (i32.const {status}))"))
    assert failed.reason == f"exit {status}"
    assert "a word for the log" in str(failed)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("(call $answer) (call $answer)", "Extra data"),
        ("", "0 bytes"),
        ("(call $say (i32.const 1) (i32.const 1025) (i32.const 3))", "no object"),
        ("(call $say (i32.const 1) (i32.const 1024) (i32.const 6))", "no JSON"),
        ("(call $say (i32.const 1) (i32.const 4096) (i32.const 4))", "no JSON"),
    ],
    ids=["two objects", "nothing", "a string", "half of one", "zero bytes"],
)
def test_what_is_not_one_json_object_is_refused(body, says):
    failed = failure(module(body))
    assert failed.reason == "output"
    assert says in str(failed)


def printing(text: str) -> bytes:
    quoted = "".join(f"\\{byte:02x}" for byte in text.encode())
    return bytes(
        wasmtime.wat2wasm(
            f'(module {WASI} (data (i32.const 8192) "{quoted}") '
            f'(func (export "_start") (call $say (i32.const 1) (i32.const 8192) (i32.const {len(text)}))))'
        )
    )


def test_answers_that_no_reader_should_accept_are_refused():
    failed = failure(printing('{"a":NaN}'))
    assert failed.reason == "output"
    assert "NaN is no number of JSON" in str(failed)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a":-Infinity}', "no number"),
        ("[" * 1_000_000, "nested more than 26 deep"),
        ('{"a":' * 1_000_000, "nested more than 26 deep"),
        ('{"\\\\":' * 27, "nested more than 26 deep"),
        ('{"a":1}{', "Extra data"),
        ('{"a":' + "9" * 400 + "}", "400 characters is beyond double precision"),
        ('{"a":' + "9" * 5000 + "}", "beyond double precision"),
        ('{"a":-1e999}', "beyond double precision"),
        ('{"a":' + "[" * 26 + "]" * 26 + "}", "nested more than 26 deep"),
        ('{"a":' * 27 + "1" + "}" * 27, "nested more than 26 deep"),
        ('{"a":[' + "{}," * 4000 + "{}]}", "at most 4000 are read"),
        ('{"a":"\\ud800"}', "half of a character"),
        ('{"\\udfff":1}', "half of a character"),
        ("[]", "no object"),
        ("\xff", "Expecting value"),
    ],
)
def test_an_object_that_could_not_be_written_again_is_not_read(text, says):
    with pytest.raises(ValueError, match=says):
        read_object(text.encode(), max_values=2_000_000 if len(text) >= 10**6 else 4000)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[" * 25 + "]" * 25, None),
        ('"\\\\\\"' + "[" * 30 + '"', '\\"' + "[" * 30),
        ("123456789012345678", 123456789012345678),
        ("1" + "0" * 308, 1e308),
        ("-1e308", -1e308),
        ('"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
    ],
)
def test_what_is_at_the_bounds_is_read(text, value):
    found = read_object(('{"a":' + text + "}").encode())["a"]
    if value is not None:
        assert (found, type(found)) == (value, type(value))


def test_white_space_around_the_answer_is_nothing():
    assert run(printing(' {"a": [1, {"b": 2}]}\n'), {}).answer == {"a": [1, {"b": 2}]}


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (b"", "begins with"),
        (b"\x7fELF" + bytes(100), "begins with"),
        (b"(module)", "begins with"),
        (b"\0asm\x01\0\0\0" + b"\xff" * 30, "module"),
        (bytes(wasmtime.wat2wasm("(component)")), "component"),
        (bytes(wasmtime.wat2wasm('(module (memory (export "memory") 1))')), "_start"),
        (bytes(wasmtime.wat2wasm('(module (memory (export "memory") 1) (func (export "_start") (param i32)))')), "_start"),
        (bytes(wasmtime.wat2wasm('(module (func (export "_start")))')), "memory"),
        (bytes(wasmtime.wat2wasm('(module (import "env" "f" (func)) (memory (export "memory") 1) '
                                 '(func (export "_start")))')), "env"),
        (bytes(wasmtime.wat2wasm(f'(module (import "{wasm_runner.WASI}" "fork" (func)) (memory (export "memory") 1) '
                                 '(func (export "_start")))')), "fork"),
    ],
    ids=["empty", "ELF", "text", "garbage", "component", "no start", "parameter", "no memory", "foreign import", "unknown"],
)  # fmt: skip
def test_what_is_no_module_is_refused(code, says):
    failed = failure(code)
    assert failed.reason == "module"
    assert says in str(failed)


def test_a_cut_off_module_is_refused_at_every_length():
    for length in range(
        0, ANSWERS.index(b"a word for the log"), 59
    ):  # then follow names, which a module can do without
        assert failure(ANSWERS[:length]).reason == "module"


def test_there_is_no_file_and_no_argument():
    assert failure(module("(call $exit (call $fd_prestat_get (i32.const 3) (i32.const 512)))")).reason == "exit 8"
    opened = "(call $path_open (i32.const 3) (i32.const 0) (i32.const 1024) (i32.const 1) (i32.const 0) (i64.const 0) "
    opened += "(i64.const 0) (i32.const 0) (i32.const 512))"
    assert failure(module(f"(call $exit {opened})")).reason == "exit 8"  # bad descriptor
    counted = "(drop (call $args_sizes_get (i32.const 512) (i32.const 516)))"
    assert (
        failure(module(f"{counted} (call $exit (i32.add (i32.load (i32.const 512)) (i32.const 5)))")).reason == "exit 5"
    )


def test_stdin_is_empty():
    body = "(i32.store (i32.const 0) (i32.const 4096)) (i32.store (i32.const 4) (i32.const 16)) "
    body += "(drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8))) "
    body += "(call $exit (i32.add (i32.load (i32.const 8)) (i32.const 5)))"
    assert failure(module(body)).reason == "exit 5"


# Says how many bytes of environment there are, in 16 MiB of memory: the last four digits as a JSON number.
ECHO = """
  (local $size i32)
  (drop (memory.grow (i32.const 255)))
  (drop (call $environ_sizes_get (i32.const 512) (i32.const 516)))
  (drop (call $environ_get (i32.const 65536) (i32.const 131072)))
  (local.set $size (i32.load (i32.const 516)))
  (call $say (i32.const 1) (i32.const 131074) (i32.sub (local.get $size) (i32.const 3)))
"""


def test_an_environment_of_4_mib_arrives_whole():
    value = json.dumps({"long": "x" * (4 * MIB)})
    result = run(module(ECHO), {"V": value}, Limits(memory_bytes=32 * MIB))
    assert result.answer == json.loads(value)


@pytest.mark.parametrize("pair", [("", "a"), ("A=B", "a"), ("A\0", "a"), ("A", "a\0b"), ("A", "\ud800")])
def test_an_environment_that_would_arrive_changed_is_refused(pair):
    with pytest.raises(ValueError, match="environment variable"):
        run(ANSWERS, dict([pair]))


@pytest.mark.parametrize(("name", "value"), [("fuel", 0), ("memory_bytes", -1), ("wall_clock_s", 0), ("fuel", 2**63)])
def test_a_limit_that_is_none_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Limits(**{name: value})


def test_runs_beside_each_other_do_not_end_each_other():
    patient, hasty = module(SLEEP.format(ns=600_000_000)), module(LOOP)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        good = [pool.submit(run, patient, {}) for _ in range(3)]
        bad = [pool.submit(failure, hasty, fuel=10**15, wall_clock_s=0.2) for _ in range(3)]
        assert [one.result().answer for one in good] == [{"a": 1}] * 3
        assert {one.result().reason for one in bad} == {"wall clock"}


def test_a_hundred_runs_leave_no_memory_behind():
    def resident_kib() -> int:
        gc.collect()
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    for _ in range(20):
        run(ANSWERS, {"V": "x" * MIB})
    before = resident_kib()
    for _ in range(100):
        run(ANSWERS, {"V": "x" * MIB})
    assert resident_kib() - before < 20_000


def test_kept_machine_code_is_used_again_and_made_anew_when_it_is_damaged(tmp_path):
    folder = tmp_path / "compiled"
    assert run(ANSWERS, {}, kept=folder).answer == {"a": 1}
    (made,) = folder.iterdir()
    noted = made.stat().st_mtime_ns
    assert run(ANSWERS, {}, kept=folder).answer == {"a": 1}
    assert made.stat().st_mtime_ns == noted
    made.write_bytes(made.read_bytes()[:-1] + b"!")
    assert run(ANSWERS, {}, kept=folder).answer == {"a": 1}
    (again,) = folder.iterdir()
    assert again.stat().st_mtime_ns != noted


def test_machine_code_of_another_processor_is_made_anew(tmp_path):
    folder = tmp_path / "compiled"
    run(ANSWERS, {}, kept=folder)
    (made,) = folder.iterdir()
    foreign = b"made elsewhere"
    made.rename(folder / (made.name.rpartition("-")[0] + "-" + hashlib.sha256(foreign).hexdigest())).write_bytes(
        foreign
    )
    assert run(ANSWERS, {}, kept=folder).answer == {"a": 1}
    assert [path.name for path in folder.iterdir()] == [made.name]


def test_what_is_no_module_is_refused_there_too_and_nothing_is_kept(tmp_path):
    with pytest.raises(ModuleFailed, match=r"^module: it begins with b'\\x7fELF'"):
        run(b"\x7fELF", {}, kept=tmp_path / "compiled")
    assert list((tmp_path / "compiled").iterdir()) == []


def encoded(number: int) -> bytes:
    """Of WebAssembly: seven bits a byte, the lowest first."""
    return bytes([number]) if number < 128 else bytes([number % 128 | 128]) + encoded(number // 128)


def slow_to_compile(branches: int, locals_: int) -> bytes:
    """Each branch changes one of many locals, and all of them meet again after it."""
    code = b"\x01" + encoded(locals_) + b"\x7f"
    for n in range(branches):
        code += b"\x20\0\x04\x40\x20" + encoded(n % locals_) + b"\x41\1\x6a\x21" + encoded(3 * n % locals_) + b"\x0b"
    code += b"\x0b"
    parts = {1: b"\1\x60\0\0", 3: b"\1\0", 5: b"\1\0\1", 7: b"\2\6_start\0\0\6memory\2\0"}
    parts[10] = b"\1" + encoded(len(code)) + code
    return b"\0asm\1\0\0\0" + b"".join(bytes([n]) + encoded(len(part)) + part for n, part in parts.items())


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(compile_s=0.7), "more than 0.7 s"),
        (Limits(compile_memory_bytes=160 * MIB), f"having {160 * MIB} bytes of memory"),
    ],
)
def test_a_small_module_cannot_compile_for_minutes_or_take_gigabytes(tmp_path, limits, says):
    code, begun = slow_to_compile(20_000, 3000), time.monotonic()
    assert len(code) < 300_000
    with pytest.raises(ModuleFailed, match=says) as failed:
        run(code, {}, limits, kept=tmp_path / "compiled")
    assert failed.value.reason == "compile"
    assert time.monotonic() - begun < 30
    assert list((tmp_path / "compiled").iterdir()) == []


def test_a_compiling_process_that_nobody_waits_for_ends_by_itself(tmp_path):
    """As when the device was killed."""
    command = [sys.executable, "-m", "blocks.wasm_runner", str(tmp_path / "code"), "1", str(4096 * MIB)]
    done = subprocess.run(command, input=slow_to_compile(20_000, 3000), capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGXCPU


def test_what_somebody_else_could_have_written_is_not_run(tmp_path):
    """Others could write into the folder for a while, as its message says."""
    folder = tmp_path / "compiled"
    run(ANSWERS, {}, kept=folder)
    (made,) = folder.iterdir()
    noted = made.stat().st_mtime_ns
    made.chmod(0o666)
    run(ANSWERS, {}, kept=folder)
    (again,) = folder.iterdir()
    assert (again.stat().st_mtime_ns > noted, again.stat().st_mode & 0o777) == (True, 0o600)
    code = tmp_path / "code"
    again.rename(code)
    again.symlink_to(code)
    assert run(ANSWERS, {}, kept=folder).answer == {"a": 1}
    assert not again.is_symlink()


def test_limits_are_read_from_a_file_and_what_is_wrong_in_it_is_named(tmp_path):
    path = tmp_path / "limits.json"
    assert read_limits(path, Limits(fuel=7)) == Limits(fuel=7)
    path.write_text('{"memory_bytes": 1000, "wall_clock_s": 2}')
    assert read_limits(path, Limits(fuel=7)) == Limits(7, 1000, 2)
    for text, says in (
        ('{"fuel": 0}', "fuel = 0: expected a positive integer"),
        ('{"fuel": 1.5}', "fuel = 1.5: expected a positive integer"),
        ('{"compile_s": true}', "compile_s = True: expected a positive number"),
        ('{"memory": 1}', "'memory' is no limit; there are answer_values, compile_memory_bytes"),
        ("[]", "no object"),
        ("{", "Expecting"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=says) as refused:
            read_limits(path, Limits())
        assert str(refused.value).startswith(f"{path}: ")


def test_machine_code_is_not_read_where_others_write(tmp_path):
    folder = tmp_path / "compiled"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="chmod 700"):
        run(ANSWERS, {}, kept=folder)


def test_few_files_of_machine_code_are_kept(tmp_path):
    for size in range(6):
        run(printing('{"a":' + "1" * (size + 1) + "}"), {}, kept=tmp_path / "compiled")
    assert len(list((tmp_path / "compiled").iterdir())) == 4


def test_without_a_runtime_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wasmtime", None)
    with pytest.raises(NoRuntime, match=r"pip install 'healchain\[edge\]'"):
        run(ANSWERS, {})


def test_the_runner_needs_nothing_but_wasmtime():
    """A small device loads it."""
    heavy = ("prefect", "torch", "web3", "numpy", "pydantic")
    program = f"import sys, blocks.wasm_runner; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
