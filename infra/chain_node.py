"""The stack's own chain as a node on the network: anvil, behind a gate that forgets nothing. `python -m infra.chain_node`.

anvil writes its state file in place, once a second: kill -9 lost up to 87 blocks and tore the file once in 20 tries; after
loading one, its clock is the machine's again and BLOCKHASH of every earlier block, from which aggregators are drawn, is wrong.
Played again from its first block, the same anvil makes the same chain, hash by hash. So the gate

    takes one request at a time and has each transaction mined at once, in a block of its own;
    writes each block to FOLDER/blocks.jsonl, through to the disk, before it answers: what anybody was told of is kept;
    mines an empty block when the newest is asked for and the last is a second old, so that chain time passes for whoever waits;
    plays the file again at its start, and refuses to go on when a hash differs;
    lets through what reads, signed transactions, and what moves the clock forward; nothing that makes up money or a sender.

    FOLDER/genesis.json    what block 0 is made of
    FOLDER/blocks.jsonl    {"timestamp", "hash", "transactions": [signed bytes, ...]}, a line a block
"""

import argparse
import http.client
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

CHAIN_ID = 31337
GENESIS_WEI = 10**24
# An empty block is mined at most this often; while nothing happens, ever more seldom, down to the pace of public chains: each
# makes the start some 2 ms longer, for good.
BLOCK_S, IDLE_BLOCK_S = 1.0, 12.0
SLOWER_S = 0.1
MAX_REQUEST_BYTES = 2**22  # a deployment is some 50 kB
BINARY_ENVIRONMENT = "HEALCHAIN_ANVIL"
# `npm ci` in contracts puts it there.
BINARY = Path(__file__).parents[1] / "contracts/node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil"

NEWEST = frozenset({"eth_blockNumber", "eth_getBlockByNumber"})
READS = NEWEST | {
    "eth_call",
    "eth_chainId",
    "eth_estimateGas",
    "eth_feeHistory",
    "eth_gasPrice",
    "eth_getBalance",
    "eth_getBlockByHash",
    "eth_getBlockReceipts",
    "eth_getCode",
    "eth_getLogs",
    "eth_getRawTransactionByHash",
    "eth_getStorageAt",
    "eth_getTransactionByBlockHashAndIndex",
    "eth_getTransactionByBlockNumberAndIndex",
    "eth_getTransactionByHash",
    "eth_getTransactionCount",
    "eth_getTransactionReceipt",
    "eth_maxPriorityFeePerGas",
    "eth_syncing",
    "net_version",
    "txpool_content",
    "txpool_status",
    "web3_clientVersion",
}
WRITES = frozenset(
    {"eth_sendRawTransaction", "evm_mine", "anvil_mine", "evm_increaseTime", "evm_setNextBlockTimestamp"}
)
log = logging.getLogger("chain")


class NotTheSameChain(RuntimeError):
    """Played again, a block has another hash: the file was changed, or this is another anvil."""


class Refused(RuntimeError):
    """The node answered a request with an error."""


def binary() -> Path:
    """anvil: the one that HEALCHAIN_ANVIL names, or npm's in contracts. Raises FileNotFoundError with the remedy."""
    path = Path(os.environ.get(BINARY_ENVIRONMENT) or BINARY)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: anvil is missing. Run `npm ci --ignore-scripts` in contracts, or name it by {BINARY_ENVIRONMENT}"
        )
    return path


def found(folder: Path, owner: str) -> None:
    """Write what block 0 is made of, once: all money belongs to `owner`, an address."""
    path = folder / "genesis.json"
    if path.exists():
        return
    genesis = {
        "config": {"chainId": CHAIN_ID},
        "timestamp": hex(int(time.time())),
        "difficulty": "0x0",
        "gasLimit": hex(30_000_000),
        "alloc": {owner: {"balance": hex(GENESIS_WEI)}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(".genesis.json")
    draft.write_text(json.dumps(genesis))
    draft.replace(path)


def start_anvil(folder: Path) -> int:
    """Start anvil on a free port of the loopback, to end with this process. Returns the port.

    It mines only when told to, and has no account of its own.
    """
    # Without --prune-history it keeps the state of each old block in a file: 150 MB for a thousand.
    flags = ["--port", "0", "--no-mining", "--accounts", "0", "--chain-id", str(CHAIN_ID), "--prune-history", "50"]
    command = ["setpriv", "--pdeathsig", "KILL", str(binary()), *flags, "--init", str(folder / "genesis.json")]
    environment = {**os.environ, "HOME": str(folder)}  # it makes a folder there
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if listening := re.match(rb"Listening on .*:(\d+)", line):
            threading.Thread(target=_follow, args=(process,), daemon=True).start()
            return int(listening[1])
    raise RuntimeError(f"anvil ended at its start with {process.wait()}: {' '.join(command)}")


def _follow(process: "subprocess.Popen[bytes]") -> None:
    """Read away what anvil says; when it ends, end this process, which is then started again with it."""
    assert process.stdout is not None
    for _ in process.stdout:
        pass
    log.error("anvil ended with %s", process.wait())
    os._exit(1)


class Gate:
    """The one way to the node: what is let through, and what is kept of it. One request at a time."""

    def __init__(self, blocks: Path, port: int) -> None:
        self._lock = threading.Lock()
        self._node = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._kept = self._play(blocks)
        self._file: IO[bytes] = blocks.open("ab")
        self._mined_s, self._empty = time.monotonic(), 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The node's answer to one JSON-RPC request. What it changed is on the disk by then."""
        method = request.get("method")
        if method not in READS | WRITES:
            said = f"{method}: not let through. This chain takes signed transactions and reads (infra/chain_node.py)"
            return {"jsonrpc": "2.0", "id": request.get("id"), "error": {"code": -32601, "message": said}}
        with self._lock:
            if method in NEWEST:
                self._let_time_pass()
            answer = self._post(request)
            if method in WRITES:
                if method == "eth_sendRawTransaction" and "result" in answer:
                    self._call("evm_mine")
                    self._empty = 0
                self._keep()
        return answer

    def _let_time_pass(self) -> None:
        """An empty block, unless there was a block a short while ago."""
        if time.monotonic() - self._mined_s >= min(max(BLOCK_S, self._empty * SLOWER_S), IDLE_BLOCK_S):
            self._call("evm_mine")
            self._empty += 1
            self._keep()

    def _keep(self) -> None:
        """Write the blocks that are not in the file yet, through to the disk. Without it they must not be seen: the end."""
        lines = b"".join(self._describe(number) for number in range(self._kept + 1, self._head() + 1))
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            log.error("%s: %s. The block is forgotten; its sender sends again", self._file.name, error)
            os._exit(1)
        if lines:
            self._kept += lines.count(b"\n")
            self._mined_s = time.monotonic()

    def _describe(self, number: int) -> bytes:
        block = self._call("eth_getBlockByNumber", hex(number), False)
        signed = [self._call("eth_getRawTransactionByHash", name) for name in block["transactions"]]
        kept = {"timestamp": int(block["timestamp"], 16), "hash": block["hash"], "transactions": signed}
        return json.dumps(kept).encode() + b"\n"

    def _play(self, blocks: Path) -> int:
        """Mine every block of the file again. Returns how many. A line that a kill cut off was never answered for."""
        text = blocks.read_bytes() if blocks.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(blocks, len(whole))
        began_s, last = time.monotonic(), {"timestamp": 0}
        for number, line in enumerate(whole.splitlines(), start=1):
            last = json.loads(line)
            self._mine_again(number, last)
        self._call("evm_setTime", max(int(time.time()), last["timestamp"]))
        log.info("%d blocks in %.1f s", whole.count(b"\n"), time.monotonic() - began_s)
        return whole.count(b"\n")

    def _mine_again(self, number: int, block: dict[str, Any]) -> None:
        try:
            for signed in block["transactions"]:
                self._call("eth_sendRawTransaction", signed)
            self._call("evm_setNextBlockTimestamp", block["timestamp"])
            self._call("evm_mine")
        except Refused as refused:
            raise NotTheSameChain(
                f"block {number} cannot be made again, {refused}: use the anvil that made it, or restore blocks.jsonl"
            ) from None
        if block["transactions"] or number % 100 == 0:  # a hash covers all blocks before it
            mined = self._call("eth_getBlockByNumber", hex(number), False)["hash"]
            if mined != block["hash"]:
                raise NotTheSameChain(
                    f"block {number} is {mined}, was {block['hash']}: use the anvil that made it, or restore blocks.jsonl"
                )

    def _head(self) -> int:
        return int(self._call("eth_blockNumber"), 16)

    def _call(self, method: str, *parameters: Any) -> Any:
        answer = self._post({"jsonrpc": "2.0", "id": 0, "method": method, "params": list(parameters)})
        if "error" in answer:
            raise Refused(f"{method}: {answer['error']}")
        return answer["result"]

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        self._node.request("POST", "/", json.dumps(request), {"Content-Type": "application/json"})
        answer: dict[str, Any] = json.loads(self._node.getresponse().read())
        return answer


class _Handler(BaseHTTPRequestHandler):
    """JSON-RPC over HTTP: one request or a list of them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    gate: Gate

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= MAX_REQUEST_BYTES:
            return self._send(413, {"error": f"a request has 1 to {MAX_REQUEST_BYTES} bytes"})
        try:
            asked = json.loads(self.rfile.read(length))
            requests = asked if isinstance(asked, list) else [asked]
            answers = [self.gate.answer(request) for request in requests]
        except (ValueError, AttributeError) as error:
            return self._send(400, {"error": f"no JSON-RPC request: {error}"})
        except (OSError, http.client.HTTPException, Refused) as error:
            # The node is ending, or did not mine: what it holds beyond the file must not be seen.
            log.error("%s", error)
            os._exit(1)
        self._send(200, answers if isinstance(asked, list) else answers[0])

    def _send(self, status: int, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """A line a request would fill the log."""


def serve(folder: Path, host: str, port: int) -> None:
    """Serve the chain of this folder until the process ends. Raises FileNotFoundError, NotTheSameChain, OSError."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server((host, port), _Handler, bind_and_activate=False) as server:
        server.allow_reuse_address = True
        server.server_bind()
        _Handler.gate = Gate(folder / "blocks.jsonl", start_anvil(folder))
        server.server_activate()  # whoever connects is answered from here on
        log.info("chain %d at http://%s:%d", CHAIN_ID, host, port)
        server.serve_forever()


def read_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the stack's own chain")
    parser.add_argument("--folder", type=Path, required=True, help="where genesis.json and blocks.jsonl are")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--owner", help="address that owns all money at the start, for a chain that is not there yet")
    read = parser.parse_args(given)
    if not (read.folder / "genesis.json").exists() and not re.fullmatch("0x[0-9a-fA-F]{40}", read.owner or ""):
        parser.error(
            f"--owner {read.owner}: {read.folder} has no chain yet; give the address that owns its first money"
        )
    return read


def main() -> None:
    read = read_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if read.owner:
        found(read.folder, read.owner)
    serve(read.folder, read.host, read.port)


if __name__ == "__main__":
    main()
