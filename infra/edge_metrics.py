"""What Prometheus is told of edge devices: counts of the ledger when it asks, and how long updates took in this process.

healchain_edge_devices{state}              alive, silent
healchain_edge_rounds{status}              rounds by how they stand
healchain_edge_model_version               the newest version
healchain_edge_messages_waiting            messages that no broker has taken
healchain_edge_updates_total{transport}    updates that were accepted since this process began
healchain_edge_refusals_total{transport,status}
healchain_edge_update_seconds              from the last byte of an update to its answer
healchain_edge_broker_connected            1 while the bridge is connected
"""

from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from blocks.edge_ledger import is_alive
from tasks.edge.server import Server, utc_now

BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        here, by_status = self._registry, ["transport", "status"]
        self._updates = Counter("healchain_edge_updates", "Updates that were accepted", ["transport"], registry=here)
        self._refusals = Counter("healchain_edge_refusals", "Updates that were refused", by_status, registry=here)
        self._seconds = Histogram(
            "healchain_edge_update_seconds", "Seconds of an update", buckets=BUCKETS, registry=here
        )
        self.connected = Gauge("healchain_edge_broker_connected", "Whether the bridge is connected", registry=here)

    def accepted(self, transport: str, seconds: float) -> None:
        self._updates.labels(transport).inc()
        self._seconds.observe(seconds)

    def refused(self, transport: str, status: int) -> None:
        self._refusals.labels(transport, str(status)).inc()

    def text(self, server: Server) -> bytes:
        """In Prometheus' format."""
        of_ledger = CollectorRegistry()
        of_ledger.register(_OfLedger(server))
        return generate_latest(self._registry) + generate_latest(of_ledger)


class _OfLedger(Collector):
    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        ledger, now = self._server.ledger, utc_now()
        within_s = self._server.pinned.alive_within_s
        alive = Tally("alive" if is_alive(row, now, within_s) else "silent" for row in ledger.devices())
        yield _family("healchain_edge_devices", "Devices", "state", {"alive": 0, "silent": 0} | alive)
        yield _family("healchain_edge_rounds", "Rounds", "status", ledger.count_rounds())
        newest = ledger.newest_version()
        yield GaugeMetricFamily(
            "healchain_edge_model_version", "The newest version", value=-1 if newest is None else newest
        )
        yield GaugeMetricFamily("healchain_edge_messages_waiting", "Messages to be published", value=ledger.waiting())

    def describe(self) -> Iterator[Metric]:
        return iter(())


def _family(name: str, said: str, label: str, counts: dict[str, int]) -> Metric:
    found = GaugeMetricFamily(name, said, labels=[label])
    for value, count in sorted(counts.items()):
        found.add_metric([value], count)
    return found
