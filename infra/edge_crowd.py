"""Simulated devices for the benchmark of edge rounds: asyncio tasks that speak as infra.edge_device does.

Each has its own key and connection to the broker, says that it is alive, hears of its task, fetches the model and hands its
update in: of ten one over MQTT, one in CBOR over HTTP, the others in JSON over HTTP. One in MODULE_EVERY runs the training
module in wasmtime; the others add to the model what `step_of` says. A device's tries are those of a real one.

    python -m infra.edge_crowd       a Plan as a line of JSON on stdin, with the keys of the devices; `ready` on stdout when all
                                     are connected; `end` on stdin, then a Report as a line of JSON on stdout
"""

import asyncio
import itertools
import json
import logging
import random
import resource
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import aiomqtt
import httpx

from blocks import wasm_runner
from infra.edge_device import HTTP_ATTEMPTS, encode_cbor
from tasks.edge import seal
from tasks.edge.seal import UPDATE

MODULE_EVERY = 100
SAMPLES_MAX = 100
ROWS = 64  # of those that run the module
CONNECTING = 20  # at a time
ANSWER_S = 120.0
log = logging.getLogger(__name__)


class Plan(TypedDict):
    """url: of the gateway; devices: place, id and key of each; watches: the first one hears of new versions, too."""

    url: str
    mqtt_port: int
    prefix: str
    beat_s: float
    round_id: str
    devices: list[tuple[int, str, str]]
    watches: bool


class Done(TypedDict):
    """What one device did. heard_s: Unix seconds; fetch_s, hand_in_s: how long; way: json, cbor or mqtt."""

    name: str
    heard_s: float
    fetch_s: float
    hand_in_s: float
    way: str
    ran_module: bool
    retries: int
    samples: int
    w: list[float]
    b: float


class Report(TypedDict):
    """cpu_s: of this process since `ready`; noticed_s: when the new version was heard of, 0 if it was not."""

    done: list[Done]
    failed: list[str]
    cpu_s: float
    noticed_s: float


def way_of(place: int) -> str:
    return {1: "mqtt", 2: "cbor"}.get(place % 10, "json")


def step_of(name: str, width: int) -> tuple[list[float], float, int]:
    """What a device without the module adds to w and b, and its samples; always the same."""
    drawn = random.Random(name)
    return [drawn.gauss(0, 1) for _ in range(width)], drawn.gauss(0, 1), drawn.randint(1, SAMPLES_MAX)


def rows_of(name: str, width: int) -> str:
    """Data of a device that runs the module, as JSON."""
    drawn = random.Random(name)
    xs = [[drawn.uniform(-1, 1) for _ in range(width)] for _ in range(ROWS)]
    return json.dumps({"data": [{"x": x, "y": int(sum(x) > 0)} for x in xs]})


class Crowd:
    """The devices of one process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.turn = asyncio.Semaphore(CONNECTING)
        self.training = asyncio.Semaphore(1)
        self.compiled = tempfile.TemporaryDirectory()
        # Each request has a connection of its own, as a device's has.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(base_url=plan["url"], timeout=ANSWER_S, limits=limits)
        self.done: list[Done] = []
        self.failed: list[str] = []
        self.noticed_s = 0.0

    async def run(self) -> Report:
        """Until `end` is read."""
        devices = [Simulated(self, *one) for one in self.plan["devices"]]
        async with asyncio.TaskGroup() as group:
            parts = [group.create_task(one.run()) for one in devices]
            await asyncio.gather(*(one.is_connected.wait() for one in devices))
            began_s = time.process_time()
            print("ready", flush=True)
            while (await asyncio.to_thread(sys.stdin.readline)).strip() not in ("end", ""):
                pass
            for part in parts:
                part.cancel()
        await self.http.aclose()
        cpu_s = time.process_time() - began_s
        return {"done": self.done, "failed": self.failed, "cpu_s": cpu_s, "noticed_s": self.noticed_s}


class Simulated:
    """One device."""

    def __init__(self, crowd: Crowd, place: int, name: str, key: str) -> None:
        self.crowd, self.plan, self.place, self.name, self.key = crowd, crowd.plan, place, name, key
        self.is_connected = asyncio.Event()
        # The messages that start tasks go to all devices; those of others are not parsed, which spares this machine.
        self.mark = json.dumps({"proplet_id": name})[1:-1].encode()
        self.sealing_key, self.counter = seal.key_of(key), itertools.count(time.time_ns())
        self.watches = self.plan["watches"] and place == 0
        self.retries = 0
        self.work: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until it is cancelled; a lost connection is made again."""
        while True:
            with suppress(aiomqtt.MqttError):
                await self._live()
            await asyncio.sleep(random.uniform(0.5, 1.5))

    async def _live(self) -> None:
        async with AsyncExitStack() as stack:
            async with self.crowd.turn:
                client = await stack.enter_async_context(self._client())
                start = "control/manager/start"
                for topic in (start, f"{start}/{self.name}", *(("fl/rounds/next",) if self.watches else ())):
                    await client.subscribe(self.plan["prefix"] + topic, qos=1)
                await self._say(client, "control/proplet/create", metadata={"environment": "edge", "os": "linux"})
            self.is_connected.set()
            beating = asyncio.create_task(self._beat(client))
            stack.callback(beating.cancel)
            async for message in client.messages:
                self._hear(client, message)

    def _client(self) -> aiomqtt.Client:
        return aiomqtt.Client(
            "127.0.0.1",
            self.plan["mqtt_port"],
            username=self.name,
            password=self.key,
            identifier=self.name,
            keepalive=60,
            timeout=ANSWER_S,
        )

    async def _beat(self, client: aiomqtt.Client) -> None:
        await asyncio.sleep(random.uniform(0, self.plan["beat_s"]))
        with suppress(aiomqtt.MqttError):  # the one that listens finds it out, too
            while True:
                await self._say(client, "control/proplet/alive", status="alive", healthy=True)
                used = {"cpu_metrics": {"user_seconds": 1.0}, "memory_metrics": {"rss_bytes": 40_000_000}}
                await self._say(client, "control/proplet/metrics", **used)
                await asyncio.sleep(self.plan["beat_s"])

    async def _say(self, client: aiomqtt.Client, topic: str, **fields: Any) -> None:
        said = {"proplet_id": self.name, "namespace": "default", **fields}
        await client.publish(self.plan["prefix"] + topic, self._sealed(topic, said), qos=1)

    def _sealed(self, kind: str, said: dict[str, Any]) -> bytes:
        return seal.seal(json.dumps(said).encode(), self.sealing_key, kind, self.name, next(self.counter))

    def _hear(self, client: aiomqtt.Client, message: aiomqtt.Message) -> None:
        payload = bytes(message.payload)
        if message.topic.value.endswith("/fl/rounds/next"):
            if json.loads(payload)["round_id"] == self.plan["round_id"]:
                self.crowd.noticed_s = self.crowd.noticed_s or time.time()
        elif self.mark in payload and self.work is None:
            task = json.loads(payload)
            if task["env"]["ROUND_ID"] == self.plan["round_id"]:
                self.work = asyncio.create_task(self._try(client, task, time.time()))

    async def _try(self, client: aiomqtt.Client, task: dict[str, Any], heard_s: float) -> None:
        try:
            await self._take_part(client, task, heard_s)
        except Exception as error:  # whatever it is, it belongs into the report
            self.crowd.failed.append(f"{self.name}: {type(error).__name__}: {error}"[:500])

    async def _take_part(self, client: aiomqtt.Client, task: dict[str, Any], heard_s: float) -> None:
        began_s = time.perf_counter()
        version = task["env"]["MODEL_URI"].rpartition("_v")[2]
        model = (await self._ask("GET", f"/models/{version}")).text
        fetch_s = time.perf_counter() - began_s
        ran_module = self.place % MODULE_EVERY == 0
        update = await self._with_module(task, model) if ran_module else _plain(self.name, json.loads(model))
        update |= {
            "round_id": self.plan["round_id"],
            "proplet_id": self.name,
            "base_model_uri": task["env"]["MODEL_URI"],
        }
        began_s = time.perf_counter()
        await self._hand_in(client, update)
        self.crowd.done.append(
            {
                "name": self.name,
                "heard_s": heard_s,
                "fetch_s": fetch_s,
                "hand_in_s": time.perf_counter() - began_s,
                "way": way_of(self.place),
                "ran_module": ran_module,
                "retries": self.retries,
                "samples": update["num_samples"],
                "w": update["update"]["w"],
                "b": update["update"]["b"],
            }
        )

    async def _with_module(self, task: dict[str, Any], model: str) -> dict[str, Any]:
        module = (await self._ask("GET", f"/modules/{task['sha256']}")).content
        data = rows_of(self.name, len(json.loads(model)["w"]))
        environment = {**task["env"], "PROPLET_ID": self.name, "MODEL_DATA": model, "DATASET_DATA": data}
        async with self.crowd.training:
            run = partial(wasm_runner.run, module, environment, kept=Path(self.crowd.compiled.name))
            answer: dict[str, Any] = (await asyncio.to_thread(run)).answer
        return {name: answer[name] for name in ("num_samples", "metrics", "update")}

    async def _hand_in(self, client: aiomqtt.Client, update: dict[str, Any]) -> None:
        way = way_of(self.place)
        if way == "mqtt":
            with suppress(aiomqtt.MqttError):
                topic = f"{self.plan['prefix']}fl/rounds/{self.plan['round_id']}/updates/{self.name}"
                await client.publish(topic, self._sealed(UPDATE, update), qos=1)
                return
            self.retries += 1
        if way == "cbor":
            await self._ask("POST", "/update_cbor", encode_cbor(update), "application/cbor")
        else:
            await self._ask("POST", "/update", json.dumps(update).encode(), "application/json")

    async def _ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> httpx.Response:
        """Raises RuntimeError for what is refused; what failed is tried again, as often as a device does."""
        headers = {"Authorization": f"Bearer {self.key}"} | ({"Content-Type": kind} if kind else {})
        said = ""
        for attempt in range(HTTP_ATTEMPTS):
            try:
                answer = await self.crowd.http.request(method, path, content=body, headers=headers)
                if answer.status_code < 400:
                    return answer
                said = f"HTTP {answer.status_code}: {answer.text[:200]}"
            except httpx.HTTPError as error:
                said = type(error).__name__
            self.retries += 1
            await asyncio.sleep(2.0**attempt * random.uniform(0.5, 1.0))
        raise RuntimeError(f"{self.name}: {method} {path}: {said}")


def _plain(name: str, model: dict[str, Any]) -> dict[str, Any]:
    step, offset, samples = step_of(name, len(model["w"]))
    moved = {"w": [old + new for old, new in zip(model["w"], step, strict=True)], "b": model["b"] + offset}
    return {"num_samples": samples, "metrics": {"loss": 0.5}, "update": moved}


def main() -> None:
    logging.getLogger("mqtt").setLevel(logging.CRITICAL)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    plan: Plan = json.loads(sys.stdin.readline())
    print(json.dumps(asyncio.run(Crowd(plan).run())), flush=True)


if __name__ == "__main__":
    main()
