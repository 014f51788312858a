"""What a device meets, in this process: a coordinator over HTTP as existing devices know it, and a broker of MQTT."""

import asyncio
import base64
import hashlib
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiomqtt
import uvicorn
from amqtt.broker import Broker
from amqtt.contexts import BrokerConfig, ListenerConfig
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse

from tasks.edge import seal

PREFIX = "m/healchain/c/edge/"
KEY = "secret-of-the-device"
START, ANSWERS = "control/manager/start", "control/manager/answers"
PATIENCE_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: Callable[[], Any], why: str, patience_s: float = PATIENCE_S) -> Any:
    """What `what` gives once it gives something."""
    ends = time.monotonic() + patience_s
    while time.monotonic() < ends:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {patience_s} s: {why}")


class Site:
    """Servers on two ports that can be stopped and started again. Tests change its fields to change what is answered.

    answers: status and text of the next answers to an update, before the ordinary one. updates: (path, type, body, key) of
    those taken. heard: (topic, payload without its seal) of all that was published. said_to_updates: the status that an
    update over MQTT is answered with; None: none, as existing servers do.
    """

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        """certificate: with its key, and TLS is spoken on both ports."""
        self._certificate, s = certificate, "s" if certificate else ""
        self.http_port, self.mqtt_port = free_port(), free_port()
        self.url, self.mqtt_url = f"http{s}://127.0.0.1:{self.http_port}", f"mqtt{s}://127.0.0.1:{self.mqtt_port}"
        self.models: dict[int, Any] = {0: {"w": [0.0, 0.0, 0.0], "b": 0.0}}
        self.datasets: dict[str, Any] = {}
        self.modules: dict[str, bytes] = {}
        self.tasks: dict[str, dict[str, Any]] = {}
        self.answers: list[tuple[int, str]] = []
        self.updates: list[tuple[str, str, bytes, str]] = []
        self.heard: list[tuple[str, Any]] = []
        self.beats: list[tuple[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self.chunk_sha256 = ""
        self.said_to_updates: int | None = 200
        self.counter = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.start_http()
        self.start_broker()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def start_http(self) -> None:
        more = {}
        if self._certificate is not None:
            more = {"ssl_certfile": self._certificate[0], "ssl_keyfile": self._certificate[1]}
        config = uvicorn.Config(self._app(), "127.0.0.1", self.http_port, log_level="critical", lifespan="off", **more)
        self._server = uvicorn.Server(config)
        self._serving = asyncio.run_coroutine_threadsafe(self._server.serve(), self._loop)
        wait_for(lambda: self._server.started, "HTTP")

    def stop_http(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._serving.result(PATIENCE_S)

    def start_broker(self) -> None:
        plugin = "amqtt.plugins.authentication.AnonymousAuthPlugin"
        config = BrokerConfig(
            listeners={"default": self._listener_config()},
            plugins={plugin: {"allow_anonymous": True}},
        )

        async def start() -> None:
            self._broker = Broker(config)
            await self._broker.start()
            listening = asyncio.Event()
            self._listener = asyncio.create_task(self._listen(listening))
            await asyncio.wait_for(listening.wait(), PATIENCE_S)

        self.do(start())

    def _listener_config(self) -> ListenerConfig:
        bind = f"127.0.0.1:{self.mqtt_port}"
        if self._certificate is None:
            return ListenerConfig(bind=bind)
        certificate, key = map(str, self._certificate)
        return ListenerConfig(bind=bind, ssl=True, certfile=certificate, keyfile=key)

    async def _listen(self, listening: asyncio.Event) -> None:
        tls = self._certificate and ssl.create_default_context(cafile=str(self._certificate[0]))
        async with aiomqtt.Client("127.0.0.1", self.mqtt_port, tls_context=tls) as client:
            self._client = client
            await client.subscribe("#", qos=1)
            listening.set()
            async for message in client.messages:
                topic = str(message.topic)
                try:
                    said = _said(topic.removeprefix(PREFIX), bytes(message.payload))
                except (ValueError, RecursionError):
                    continue
                self.heard.append((topic, said))
                if topic == f"{PREFIX}registry/proplet":
                    await self._send_pieces(said["app_name"])
                elif "/updates/" in topic and self.said_to_updates is not None:
                    await self.answer(said["round_id"], said["proplet_id"], self.said_to_updates)

    def stop_broker(self) -> None:
        async def stop() -> None:
            self._listener.cancel()
            await asyncio.wait([self._listener])
            await self._broker.shutdown()

        self.do(stop())

    def close(self) -> None:
        self.stop_broker()
        self.stop_http()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def answer(self, round_id: str, device: str, status: int, key: str = KEY) -> None:
        """What a server says to an update over MQTT."""
        said = {"round_id": round_id, "proplet_id": device, "status": status, "detail": "because"}
        payload = self.sealed(said, ANSWERS, device, key)
        await self._client.publish(f"{PREFIX}{ANSWERS}/{device}", payload, qos=1)

    def sealed(self, said: dict[str, Any], kind: str, device: str, key: str = KEY) -> bytes:
        return seal.seal(json.dumps(said).encode(), seal.key_of(key), kind, device, next(self.counter))

    # What tests do

    def publish(self, topic: str, payload: Any) -> None:
        self.do(
            self._client.publish(PREFIX + topic, payload if isinstance(payload, bytes) else json.dumps(payload), qos=1)
        )

    def start_round(self, round_id: str, device: str, module: bytes, *, version: int = 0, **more: Any) -> None:
        """As a manager starts a task on a device over MQTT."""
        env = {
            "ROUND_ID": round_id,
            "MODEL_URI": f"fl/models/global_model_v{version}",
            "HYPERPARAMS": json.dumps({"epochs": 5, "lr": 0.5, "batch_size": 4}),
        }
        how = more or {"file": base64.b64encode(module).decode()}
        name = f"fl-round-{round_id}-{device}"
        said = {"id": "t-1", "name": name, "env": env, "proplet_id": device, **how}
        self.publish(START, self.sealed(said, START, device))

    def open_round(self, round_id: str, module: bytes) -> None:
        """As a coordinator has a round open for who asks."""
        sha256 = hashlib.sha256(module).hexdigest()
        self.modules[sha256] = module
        self.tasks[round_id] = {
            "round_id": round_id,
            "model_ref": "fl/models/global_model_v0",
            "hyperparams": {"epochs": 5, "lr": 0.5, "batch_size": 4},
            "task_wasm_image": "logistic",
            "task_wasm_sha256": sha256,
        }

    def said_on(self, tail: str) -> list[Any]:
        return [said for topic, said in self.heard if topic == PREFIX + tail]

    def update_of(self, round_id: str, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        def find() -> Any:
            for path, _, body, _ in self.updates:
                if path == "/update" and (said := json.loads(body))["round_id"] == round_id:
                    return said
            return None

        found: dict[str, Any] = wait_for(find, f"an update of {round_id}", patience_s)
        return found

    async def _send_pieces(self, app_name: str) -> None:
        for sha256, data in self.modules.items():
            pieces = [data[start : start + 20_000] for start in range(0, len(data), 20_000)]
            for index, piece in reversed(list(enumerate(pieces))):
                said = {"app_name": app_name, "chunk_idx": index, "total_chunks": len(pieces)}
                said |= {"data": base64.b64encode(piece).decode(), "sha256": self.chunk_sha256 or sha256}
                await self._client.publish(f"{PREFIX}registry/server", json.dumps(said), qos=1)

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def note(request: Request, call_next: Any) -> Any:
            self.asked.append((request.url.path, request.headers.get("authorization", "")))
            return await call_next(request)

        @app.get("/rounds/next")
        async def rounds_next(proplet_id: str = "") -> Any:
            return {"next_round_available": False, "open_rounds": list(self.tasks)}

        @app.get("/task")
        async def task(round_id: str, proplet_id: str) -> Any:
            return {"task": {**self.tasks[round_id], "config": {"proplet_id": proplet_id}}}

        @app.get("/models/{version}")
        async def model(version: int) -> Any:
            found = self.models.get(version)
            return PlainTextResponse("Model not found\n", 404) if found is None else JSONResponse(found)

        @app.get("/datasets/{proplet_id}")
        async def dataset(proplet_id: str) -> Any:
            found = self.datasets.get(proplet_id)
            return PlainTextResponse("Dataset not found\n", 404) if found is None else JSONResponse(found)

        @app.get("/modules/{sha256}")
        async def module(sha256: str) -> Any:
            return Response(self.modules[sha256]) if sha256 in self.modules else PlainTextResponse("none\n", 404)

        @app.get("/elsewhere/{sha256}")
        async def elsewhere(sha256: str) -> Any:
            return RedirectResponse(f"/modules/{sha256}")

        @app.post("/devices/{proplet_id}/alive")
        async def alive(request: Request, proplet_id: str) -> Any:
            self.beats.append((proplet_id, await request.json()))
            return {"status": "accepted"}

        @app.post("/update")
        @app.post("/update_cbor")
        async def update(request: Request) -> Any:
            body = await request.body()
            if self.answers:
                status, text = self.answers.pop(0)
                return PlainTextResponse(f"{text}\n", status)
            kind, key = request.headers["content-type"], request.headers.get("authorization", "")
            self.updates.append((request.url.path, kind, body, key))
            return {"status": "accepted"}

        return app


def _said(topic: str, payload: bytes) -> Any:
    """What somebody says, without its seal, which a device's word must have. Raises NotSealed."""
    said = json.loads(payload)
    if topic.startswith("control/manager") or topic == "registry/server":
        return {name: value for name, value in said.items() if name != "seal"} if isinstance(said, dict) else said
    kind = seal.UPDATE if "/updates/" in topic else topic
    return json.loads(seal.opened(payload, seal.key_of(KEY), kind, said["proplet_id"])[0])


class DeviceProcess:
    """A device as a process of its own. Its home stays when it is killed."""

    def __init__(self, site: Site, home: Path, *flags: str, name: str = "device-1", **environment: str) -> None:
        self.home, self.name, self.site = home, name, site
        self.flags = [
            "--server",
            site.url,
            "--home",
            str(home),
            "--id",
            name,
            "--beat-s",
            "0.3",
            "--poll-s",
            "0.3",
            *flags,
        ]
        self.environment = {**os.environ, "HEALCHAIN_DEVICE_KEY": KEY, **environment}
        self.log = home.with_name(f"{home.name}.log")
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "infra.edge_device", *self.flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def said(self) -> str:
        return self.log.read_text()

    def rounds(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.home / "rounds").glob("*.json"))]

    def state_of(self, round_id: str) -> str:
        return next((one["state"] for one in self.rounds() if one["round_id"] == round_id), "")

    def status(self) -> dict[str, Any]:
        path = self.home / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def is_connected(self) -> bool:
        return (self.status().get("pid"), self.status().get("mqtt")) == (self.process.pid, "connected")

    def memory_kib(self, what: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(what))
