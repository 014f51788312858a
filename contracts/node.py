"""A chain's node, asked over HTTP: one that is away for a while is waited for, and its whole address is told to nobody.

A node's address may hold a key of its provider, in the path or before the host, and so does the text of every exception
of `requests`: logs, states and records get the text of this module's only.
Errors: NodeUnreachable, once it was waited for; a node that refuses is not waited for.
"""

import time
from typing import Any
from urllib.parse import urlsplit

from requests import ConnectionError as Disconnected
from requests import RequestException, Timeout
from requests.exceptions import ChunkedEncodingError
from web3 import HTTPProvider
from web3.types import RPCEndpoint, RPCResponse

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
# Too slow, too many at once, or not ready.
PASSING = {408, 425, 429, 500, 502, 503, 504}
# What may be asked twice when it is not known whether the first was heard: questions, and bytes that are signed, since a
# nonce is mined once.
REPEATABLE = (
    "eth_blockNumber",
    "eth_call",
    "eth_chainId",
    "eth_estimateGas",
    "eth_feeHistory",
    "eth_gasPrice",
    "eth_get",
    "eth_maxPriorityFeePerGas",
    "eth_sendRawTransaction",
    "net_version",
    "web3_clientVersion",
)


class NodeUnreachable(ConnectionError):
    """The node did not answer within the time, or refuses this host."""


class Node(HTTPProvider):
    """web3 provider over the node at `rpc`. patience_s: longest wait of one question for a node that is away."""

    def __init__(self, rpc: str, *, patience_s: float) -> None:
        super().__init__(rpc, exception_retry_configuration=None)  # `make_request` repeats
        self._patience_s = patience_s
        self._shown = shown(rpc)

    def __str__(self) -> str:
        return self._shown

    def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """The node's answer. Raises NodeUnreachable."""
        asked, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return super().make_request(method, params)
            except (RequestException, ConnectionError) as error:
                waited_s = time.monotonic() - asked
                problem, passes = self._problem(error, waited_s), _may_pass(error)
            if not (passes and method.startswith(REPEATABLE)) or waited_s >= self._patience_s:
                # Outside of `except`: an exception remembers the one that was being handled, with the address in it.
                raise NodeUnreachable(problem)
            time.sleep(min(pause_s, self._patience_s - waited_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _problem(self, error: Exception, waited_s: float) -> str:
        status, name = _status(error), type(error).__name__
        if status and status not in PASSING:
            return (
                f"the node at {self._shown} refuses ({name} {status}): is rpc right, with the key that the node's provider "
                "asks for?"
            )
        return (
            f"the node at {self._shown} did not answer for {round(waited_s, 1):g} s "
            f"({name}{status and f' {status}'}): is it running, and is rpc right?"
        )


def shown(rpc: str) -> str:
    """SCHEME://HOST:PORT of an address: what may be told of it."""
    parts = urlsplit(rpc)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _status(error: Exception) -> int | str:
    """The HTTP status of the answer, or an empty string without one."""
    response = getattr(error, "response", None)
    return "" if response is None else int(response.status_code)


def _may_pass(error: Exception) -> bool:
    """Whether the same question may be answered a little later."""
    if status := _status(error):
        return status in PASSING
    return isinstance(error, Disconnected | Timeout | ChunkedEncodingError | ConnectionError)
