"""A node that is away, busy or closed to us, as an HTTP server on the loopback plays it."""

import json
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from web3 import HTTPProvider, Web3
from web3.types import RPCEndpoint

import blocks.chain
from blocks.chain import Chain
from contracts.node import Node, NodeUnreachable, shown
from contracts.sending import Sending
from infra.object_store import free_port

SECRET = "c0ffee-key"


class Played:
    """A node at block 7. statuses: of its first answers; after them all is well."""

    def __init__(self, port: int, statuses: list[int]) -> None:
        self.statuses, self.asked = statuses, 0
        self._server = HTTPServer(("127.0.0.1", port), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        node = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                node.asked += 1
                answer = json.dumps({"jsonrpc": "2.0", "id": question["id"], "result": "0x7"}).encode()
                self.send_response(node.statuses.pop(0) if node.statuses else 200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


Play = Callable[..., Played]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def play(port: int) -> Iterator[Play]:
    played: list[Played] = []

    def start(*statuses: int) -> Played:
        played.append(Played(port, list(statuses)))
        return played[-1]

    yield start
    for one in played:
        one.close()


def address(port: int) -> str:
    return f"http://user:{SECRET}@127.0.0.1:{port}/v3/{SECRET}"


def refusal(port: int, method: str = "eth_blockNumber", patience_s: float = 0.2) -> NodeUnreachable:
    with pytest.raises(NodeUnreachable) as missed:
        Node(address(port), patience_s=patience_s).make_request(RPCEndpoint(method), [])
    return missed.value


def test_a_read_of_the_chain_waits_for_its_node(play: Play, port: int) -> None:
    """What a step asks while the node starts again is answered when it is there."""
    chain = Chain(rpc=address(port), sending=Sending(timeout_s=60))
    begun = threading.Timer(0.2, play)
    begun.start()
    assert chain.web3.eth.block_number == 7
    begun.join()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_node_that_is_busy_or_starts_is_asked_again(play: Play, port: int, status: int) -> None:
    node = play(status)
    assert Web3(Node(address(port), patience_s=60)).eth.block_number == 7
    assert node.asked == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_node_that_refuses_is_not_waited_for(play: Play, port: int, status: int) -> None:
    node = play(status)
    said = str(refusal(port, patience_s=60))
    assert said.startswith(
        f"the node at http://127.0.0.1:{port} refuses (HTTPError {status}): is rpc right, with the key"
    )
    assert node.asked == 1


def test_a_node_that_stays_away_is_told_with_its_host_and_port(port: int) -> None:
    said = str(refusal(port))
    assert said.startswith(f"the node at http://127.0.0.1:{port} did not answer for 0.2 s (ConnectionError")
    assert said.endswith("is it running, and is rpc right?")


@pytest.mark.parametrize("statuses", [(), (401,), (429, 429, 429, 429)])
def test_nothing_that_is_told_holds_the_key(play: Play, port: int, statuses: tuple[int, ...]) -> None:
    """Neither the error nor what it remembers: states, logs and records of refusals get it."""
    if statuses:
        play(*statuses)
    error = refusal(port)
    assert SECRET not in "".join(traceback.format_exception(error))
    assert error.__cause__ is None
    assert error.__context__ is None
    assert SECRET not in str(Node(address(port), patience_s=0))
    assert SECRET not in repr(Chain(rpc=address(port)))


def test_without_it_web3_tells_the_key(port: int) -> None:
    """The reason for the case above."""
    with pytest.raises(OSError, match=SECRET):
        Web3(HTTPProvider(f"http://127.0.0.1:{port}/v3/{SECRET}")).eth.block_number  # noqa: B018


def test_signed_bytes_are_sent_again_and_what_the_node_would_sign_is_not(play: Play, port: int) -> None:
    """A nonce is mined once; a node that signs itself takes a new one for each call."""
    node = play(503, 503)
    refusal(port, "eth_sendTransaction", patience_s=60)
    assert node.asked == 1
    signed = Node(address(port), patience_s=60).make_request(RPCEndpoint("eth_sendRawTransaction"), ["0x00"])
    assert (signed["result"], node.asked) == ("0x7", 3)


def test_who_sits_and_waits_is_told_soon(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Sending().timeout_s / 10 > blocks.chain.HURRIED_S
    monkeypatch.setattr(blocks.chain, "HURRIED_S", 0.1)
    with pytest.raises(NodeUnreachable, match=r"did not answer for 0.1 s"):
        Chain(rpc=address(port)).hurried().now_s()


@pytest.mark.parametrize(
    ("rpc", "told"),
    [
        ("https://eth.example.org/v3/key", "https://eth.example.org"),
        ("https://key@eth.example.org:8545", "https://eth.example.org:8545"),
        ("http://user:a@b@[::1]:8545/?key=k", "http://[::1]:8545"),
    ],
)
def test_what_is_shown_of_an_address(rpc: str, told: str) -> None:
    assert shown(rpc) == told
