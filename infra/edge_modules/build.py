"""The modules that come with the system: how each was compiled, and where its bytes are.

A folder holds NAME.c, NAME.wasm and NAME.wasm.sha256, as `sha256sum` writes it. Compiling again with the `ziglang` of the extra
`dev` gives the same bytes: python -m infra.edge_modules.build NAME
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent
# Stripped, because symbols name the folders of whoever compiled. The stack is small: a device's memory is.
FLAGS = ("-target", "wasm32-wasi", "-std=c11", "-Os", "-s", "-Wl,-z,stack-size=131072", "-Wall", "-Wextra", "-Werror")


class BuildFailed(RuntimeError):
    """The compiler is missing, or says what is wrong."""


def module_path(name: str) -> Path:
    """Where a module's bytes are."""
    return ROOT / name / f"{name}.wasm"


def module_of(sha256: str, folder: Path | None = None) -> bytes | None:
    """The module that has this digest (64 hex digits), one of a folder's own or one of these here; or None."""
    places = sorted(ROOT.glob("*/*.wasm")) + ([] if folder is None else sorted(folder.glob("*.wasm")))
    found = (path.read_bytes() for path in places)
    return next((data for data in found if hashlib.sha256(data).hexdigest() == sha256), None)


def compile_module(name: str, cache: Path) -> bytes:
    """The bytes that the source of a module gives. cache: of the compiler; without one it takes half a minute more."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{name}.wasm"
        done = subprocess.run(
            [sys.executable, "-m", "ziglang", "cc", *FLAGS, "-o", str(target), f"{name}.c"],
            cwd=ROOT / name,
            env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise BuildFailed(f"{name}.c does not compile with ziglang: {done.stderr.strip()[-2000:]}")
        return target.read_bytes()


def main(name: str) -> None:
    """Compile a module again and write its bytes and their digest."""
    data = compile_module(name, Path(tempfile.gettempdir()) / f"healchain-zig-{os.getuid()}")
    path = module_path(name)
    path.write_bytes(data)
    path.with_suffix(".wasm.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
