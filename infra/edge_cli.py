"""The commands of a server of edge devices: `healchain edge up`, `down`, `status`, `register`, `retry` and `schedule`."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

console = Console(highlight=False)
FolderOption = Annotated[Path, typer.Option(envvar="HEALCHAIN_EDGE_FOLDER", help="the server's keys, data and logs")]
FOLDER = Path("build/edge")
UrlOption = Annotated[str, typer.Option(help="of the gateway")]
URL = "http://127.0.0.1:8080"


def add_to(app: typer.Typer) -> None:
    """Put the commands into the group `edge`."""
    for command in (up, down, status, register, retry, schedule):
        app.command()(command)


def up(
    folder: FolderOption = FOLDER,
    host: Annotated[str, typer.Option(help="where the gateway listens")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the gateway")] = 8080,
    ports: Annotated[bool, typer.Option("--ports", help="each part on a port of its own as well")] = False,
    prefect_port: Annotated[
        int, typer.Option(help="of a Prefect server of its own, unless PREFECT_API_URL is set")
    ] = 4290,
) -> None:
    """Start gateway, broker, Prefect and the worker that conducts rounds; settings are HEALCHAIN_EDGE_... or FOLDER/edge.env."""
    folder = folder.resolve()
    with _failures():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        take_environment(folder)
        has_own = "PREFECT_API_URL" not in os.environ
        # Before Prefect is imported: it reads where its server is once.
        os.environ.setdefault("PREFECT_API_URL", f"http://127.0.0.1:{prefect_port}/api")
        os.environ.setdefault("PREFECT_HOME", str(folder / "client"))
        os.environ.setdefault("DO_NOT_TRACK", "1")
        (folder / "client").mkdir(exist_ok=True)
        from infra import edge_stack
        from infra.edge_server import read_settings

        settings = read_settings({name: value for name, value in os.environ.items() if name != "HEALCHAIN_EDGE_FOLDER"})
        plan = edge_stack.Plan(folder, settings, host, port, ports, prefect_port if has_own else 0)
        edge_stack.up(plan, lambda line: console.print(f"[green]ok[/green]  {escape(line)}", soft_wrap=True))
    console.print(
        f"a device's key    healchain edge register DEVICE --folder {folder} --url {plan.url}", soft_wrap=True
    )


def down(folder: FolderOption = FOLDER) -> None:
    """End every process of the server, and no other. The data stays."""
    from infra import supervision

    with _failures(), supervision.alone(folder.resolve()):
        ended = supervision.stop(folder.resolve())
    console.print(f"{len(ended)} processes ended; the data is in {folder}", soft_wrap=True)


def status(folder: FolderOption = FOLDER, url: UrlOption = URL) -> None:
    """The processes, the devices and the open rounds. Exit code 1 unless all processes run."""
    from infra import supervision

    with _failures():
        found = supervision.statuses(folder.resolve())
        for one in found:
            console.print(f"{one.name:10} {one.state:9} {one.pid or '':>8}", soft_wrap=True)
        is_up = bool(found) and all(one.state == "RUNNING" for one in found)
        if is_up:
            devices = _ask(folder, url, "GET", "/devices")["proplets"]
            console.print(f"{sum(one['alive'] for one in devices)} of {len(devices)} devices are alive")
            told = _ask(folder, url, "GET", "/rounds/next")
            console.print(
                f"open rounds: {', '.join(told['open_rounds']) or 'none'}; newest model: {told.get('model_uri', 'v0')}"
            )
        else:
            console.print("not all runs; healchain edge up starts it")
    raise typer.Exit(0 if is_up else 1)


def register(
    device: Annotated[str, typer.Argument(help="the id of the device: letters, digits and ._@-")],
    folder: FolderOption = FOLDER,
    url: UrlOption = URL,
) -> None:
    """Give a device a key, in place of an earlier one, and print it. It is the device's password at the broker, too."""
    with _failures():
        print(_ask(folder, url, "POST", "/devices", {"proplet_id": device})["key"])


def retry(
    round_id: Annotated[str, typer.Argument(metavar="ROUND", help="a round that ended with a warning")],
    folder: FolderOption = FOLDER,
    url: UrlOption = URL,
) -> None:
    """Combine the updates that a round has kept."""
    with _failures():
        said = _ask(folder, url, "POST", f"/fl/rounds/{round_id}/retry", {})
    console.print(f"round {round_id}: {said['status']}, version {said['model_version']}")


def schedule(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.json", help="as for POST /fl/experiments")],
    cron: Annotated[str | None, typer.Option(help='when, e.g. "0 3 * * 1": every Monday at three')] = None,
    every_s: Annotated[float | None, typer.Option(min=1, help="or the seconds from one to the next")] = None,
    folder: FolderOption = FOLDER,
) -> None:
    """Have experiments begin by themselves, each from the last model of this name, one at a time."""
    with _failures():
        if not (folder.resolve() / "admin-key").exists():
            raise ValueError(f"--folder {folder}: no admin-key there; name the folder of healchain edge up")
        # Before Prefect is imported: the profile there names the server.
        os.environ.setdefault("PREFECT_HOME", str(folder.resolve() / "home" / "prefect"))
        os.environ.setdefault("DO_NOT_TRACK", "1")
        name = _scheduled(experiment, cron, every_s)
    console.print(f"deployment [bold]{name}[/bold]: pause and resume its schedule in the Prefect UI", soft_wrap=True)


def _scheduled(path: Path, cron: str | None, every_s: float | None) -> str:
    """The deployment of a file's experiment. Raises ValueError."""
    from deployments.register import EDGE_POOLS, register_schedule
    from tasks.edge.wire import read_experiment

    request = read_experiment(path.read_bytes())
    parameters = {"name": request.name, "experiment": json.loads(path.read_text()), "actor": "edge"}
    times: dict[str, Any] = {"cron": cron, "interval_s": every_s}
    (pool,) = EDGE_POOLS
    return register_schedule(
        request.name, "edge", parameters, entrypoint="flows.edge.ask_on_schedule", pool=pool, **times
    )


def take_environment(folder: Path) -> None:
    """Put the settings of FOLDER/edge.env, mode 0600, into the environment, which comes first."""
    path = folder / "edge.env"
    if path.exists() and path.stat().st_mode & 0o077:
        raise ValueError(f"{path} may hold secrets, and others can read it: chmod 600 {path}")
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals:
            raise ValueError(f"{path}, line {number}: expected NAME=VALUE")
        os.environ.setdefault(name.strip(), value.strip())


def _ask(folder: Path, url: str, method: str, path: str, body: Any = None) -> Any:
    """Ask the gateway as its administrator. Raises ValueError with what it said."""
    key = folder.resolve() / "admin-key"
    if not key.exists():
        raise ValueError(f"--folder {folder}: no admin-key there; name the folder of healchain edge up")
    headers = {"Authorization": f"Bearer {key.read_text().strip()}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url + path, data, headers, method=method), timeout=60
        ) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()
        raise ValueError(f"the gateway: {said[:500] or error.code}") from None
    except urllib.error.URLError as error:
        raise ValueError(f"--url {url}: {error.reason}; is it running? healchain edge up starts it") from None


@contextmanager
def _failures() -> Iterator[None]:
    """What can go wrong, as one line and exit code 2."""
    try:
        yield
    except (ValueError, LookupError, RuntimeError, ImportError, OSError) as error:
        if isinstance(error, typer.Exit):
            raise
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    Console(stderr=True, highlight=False).print(f"[red]{escape(message)}[/red]")
    raise typer.Exit(2)
