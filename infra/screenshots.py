"""Pictures of the Prefect UI for the documentation, taken from a finished run of a task, with a headless Chromium.

The browser is driven through its DevTools protocol. Where the server asks for a password, the UI keeps it in the browser's local
storage, and so does this. Each picture is one page of the UI: its address, and what must be in its text before it is taken.

Errors: ScreenshotFailed.
"""

import base64
import io
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from PIL import Image
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_UI_URL
from websockets.sync.client import connect
from websockets.sync.connection import Connection

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1440
PAGE_S = 120.0  # longest wait for a page to show what it must
SETTLE_S = 4.0  # for pictures, graphs and moving panels to settle, once the text is there
COLOURS = 128
OPEN_TAB = (
    "[...document.querySelectorAll('*')].find(one => !one.children.length && one.textContent.trim() === %s).click()"
)


class ScreenshotFailed(RuntimeError):
    """No browser, no finished run, or a page that does not show what it must; the message says which."""


@dataclass(frozen=True)
class Page:
    """One picture: the file's name, the path in the UI, what its text must hold, the height in pixels, the tab to open."""

    name: str
    path: str
    shows: tuple[str, ...]
    height: int = 900
    tab: str = ""


def take(folder: Path, task_id: str | None, tell: Callable[[str], None]) -> list[Path]:
    """Take every picture of one task into a folder; their files. task_id: None for the latest that came to its end."""
    with get_client(sync_client=True) as client:
        run = finished_run(client, task_id)
        pages = pages_of(client, run)
    folder.mkdir(parents=True, exist_ok=True)
    address = str(PREFECT_UI_URL.value() or "").rstrip("/")
    if not address:
        raise ScreenshotFailed("PREFECT_API_URL is not set: name the server whose UI is to be shown")
    taken = []
    with browser() as tab:
        log_in(tab, address)
        for page in pages:
            tell(page.name)
            picture = capture(tab, address, page)
            target = folder / f"{page.name}.png"
            target.write_bytes(smaller(picture))
            taken.append(target)
    return taken


def finished_run(client: SyncPrefectClient, task_id: str | None) -> FlowRun:
    """The run that conducted the task to its end. Raises ScreenshotFailed."""
    wanted = FlowRunFilter(name=None if task_id is None else FlowRunFilterName(any_=[task_id]))
    found = client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.END_TIME_DESC, limit=200)
    for run in found:
        if run.deployment_id and run.parameters.get("spec") and run.state and run.state.is_completed():
            return run
    raise ScreenshotFailed(f"no run of task {task_id or '(any)'} came to its end on this server: submit one first")


def pages_of(client: SyncPrefectClient, run: FlowRun) -> list[Page]:
    """What there is to see of a run and of the server."""
    told = {artifact.key or "": artifact for artifact in _artifacts(client, run)}
    pages = [
        Page("runs", "/runs", (f"task:{run.name}", "withdraw"), 1300),
        Page("run", f"/runs/flow-run/{run.id}", (run.name, "Task Runs", "Artifacts"), 1000),
        Page("run-artifacts", f"/runs/flow-run/{run.id}", ("votes", "rewards"), 1500, tab="Artifacts"),
        *(
            Page(name, f"/artifacts/artifact/{found.id}", (found.key or "",), height)
            for name, height in CHAPTERS.items()
            if (found := told.get(f"{name}-{run.name}")) is not None
        ),
        *_progress_page(client, run),
        Page("work-pools", "/work-pools", ("publisher", "miners", "aggregators"), 630),
        Page("work-queues", "/work-pools/work-pool/miners?tab=Work+Queues", ("miner-1",), 700),
        Page("run-form", f"/deployments/deployment/{run.deployment_id}/run", ("spec", "participants"), 1500),
        Page("automations", "/automations", ("healchain: silent", "healchain: failed"), 1240),
    ]
    return pages


CHAPTERS = {
    "terms": 780,
    "cohort": 640,
    "submissions": 640,
    "accuracy": 462,
    "votes": 640,
    "rewards": 640,
    "summary": 720,
}
"""The artifacts of tasks.show that make a picture, with its height in pixels."""


def _artifacts(client: SyncPrefectClient, run: FlowRun) -> Sequence[Artifact]:
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    return sorted(client.read_artifacts(artifact_filter=wanted, limit=200), key=lambda one: str(one.created))


def _progress_page(client: SyncPrefectClient, run: FlowRun) -> list[Page]:
    """The progress of a miner's contribution, on the page of its run."""
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"task:{run.name}", "M3"]))
    for step in client.read_flow_runs(flow_run_filter=wanted, limit=50):
        filtered = ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[step.id]), key=ArtifactFilterKey(like_="progress-%")
        )
        if client.read_artifacts(artifact_filter=filtered, limit=1):
            return [Page("progress", f"/runs/flow-run/{step.id}", ("progress-",), 900, tab="Artifacts")]
    return []


# The browser


class Tab:
    """A page of the browser, through its DevTools protocol."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sent = connection, 0

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command; its result. Events in between are passed over."""
        self._sent += 1
        self._connection.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=PAGE_S))
            if answer.get("id") == self._sent:
                if "error" in answer:
                    raise ScreenshotFailed(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def run(self, script: str) -> Any:
        """The value of an expression in the page. Raises ScreenshotFailed."""
        answer = self.do("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise ScreenshotFailed(f"{script}: {answer['exceptionDetails']['text']}")
        return answer["result"].get("value")


@contextmanager
def browser() -> Iterator[Tab]:
    """A headless browser with a profile of its own; it ends with the block. Raises ScreenshotFailed."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        raise ScreenshotFailed(f"none of {', '.join(BROWSERS)} is installed. On Debian: apt-get install -y chromium")
    with tempfile.TemporaryDirectory(prefix="healchain-browser-", ignore_cleanup_errors=True) as profile:
        flags = (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
        )
        where = ("--remote-debugging-port=0", "--remote-debugging-address=127.0.0.1", f"--user-data-dir={profile}")
        quiet = subprocess.DEVNULL
        process = subprocess.Popen([program, *flags, *where, "about:blank"], stdout=quiet, stderr=quiet)
        try:
            with connect(_socket_of_tab(Path(profile)), max_size=None, open_timeout=PAGE_S) as connection:
                yield Tab(connection)
        finally:
            process.terminate()
            process.wait(10)


def _socket_of_tab(profile: Path) -> str:
    """Where the browser's first page listens: it chooses a port and writes it into its profile."""
    note, ends = profile / "DevToolsActivePort", time.monotonic() + PAGE_S
    while time.monotonic() < ends:
        if note.exists() and (lines := note.read_text().split()):
            with urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=PAGE_S) as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise ScreenshotFailed(f"the browser did not start within {PAGE_S:g} s")


def log_in(tab: Tab, address: str) -> None:
    """Have the UI find the password where it keeps it itself."""
    secret = PREFECT_API_AUTH_STRING.value()
    if not secret:
        return
    kept = base64.b64encode(secret.encode()).decode()
    here = urlsplit(address)
    tab.do("Page.enable")
    source = (
        f"if (location.host === {json.dumps(here.netloc)}) localStorage.setItem('prefect-password', {json.dumps(kept)})"
    )
    tab.do("Page.addScriptToEvaluateOnNewDocument", source=source)


def capture(tab: Tab, address: str, page: Page) -> bytes:
    """The page as PNG, once it shows what it must. Raises ScreenshotFailed."""
    size = {"width": WIDTH, "height": page.height, "deviceScaleFactor": 1, "mobile": False}
    tab.do("Emulation.setDeviceMetricsOverride", **size)
    tab.do("Page.navigate", url=address + page.path)
    if page.tab:
        wait_for(tab, page, (page.tab,))
        tab.run(OPEN_TAB % json.dumps(page.tab))
    wait_for(tab, page, page.shows)
    time.sleep(SETTLE_S)
    return base64.b64decode(tab.do("Page.captureScreenshot", format="png")["data"])


def wait_for(tab: Tab, page: Page, shows: Sequence[str]) -> None:
    """Return when all of this is in the page's text. Raises ScreenshotFailed."""
    ends = time.monotonic() + PAGE_S
    while not all(text in (tab.run("document.body ? document.body.innerText : ''") or "") for text in shows):
        if time.monotonic() > ends:
            raise ScreenshotFailed(f"{page.path} does not show {', '.join(shows)} within {PAGE_S:g} s")
        time.sleep(0.2)


def smaller(picture: bytes) -> bytes:
    """The picture with a palette: a third of the size, and no difference to the eye."""
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()
