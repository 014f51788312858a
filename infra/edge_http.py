"""HTTP as a small device needs it: two verbs, bounded answers, and errors told apart by what to do about them.

A device's key goes to the servers that it was given and to no other address, nor along a redirection.

Errors: Refused (the answer is final), Unreachable (it may be asked again).
"""

import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Collection
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

TOLD_BYTES = 2000  # of a refusal, in its message
BUSY = (408, 425, 429)  # of the 4xx, those that ask for patience


class Refused(RuntimeError):
    """The server understood and said no. status: as HTTP has it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class Unreachable(ConnectionError):
    """No answer, or one that says that the server cannot answer yet."""


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirected request would carry the key along."""


class Http:
    """Requests to some servers. key: sent to `trusted` addresses alone; context: of TLS; timeout_s: of each wait."""

    def __init__(
        self, *, key: str = "", trusted: Collection[str] = (), context: ssl.SSLContext | None = None, timeout_s: float
    ) -> None:
        self._key, self._timeout_s = key, timeout_s
        self._trusted = {origin_of(url) for url in trusted}
        handler = urllib.request.HTTPSHandler(context=context)
        self._opener = urllib.request.build_opener(_NoRedirection(), handler)

    def get(self, url: str, *, max_bytes: int) -> bytes:
        """The body of an answer. Raises Refused or Unreachable."""
        return self._ask(urllib.request.Request(url), max_bytes)

    def post(self, url: str, body: bytes, content_type: str, *, max_bytes: int = 2**20) -> bytes:
        return self._ask(urllib.request.Request(url, body, {"Content-Type": content_type}), max_bytes)

    def _ask(self, request: urllib.request.Request, max_bytes: int) -> bytes:
        if self._key and origin_of(request.full_url) in self._trusted:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                body: bytes = answer.read(max_bytes + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = _readable(error)
            if error.code >= 500 or error.code in BUSY:
                raise Unreachable(f"HTTP {error.code}: {said}") from None
            raise Refused(error.code, said) from None
        except (OSError, HTTPException) as error:  # a URLError is an OSError; a cut answer is neither
            raise Unreachable(_cause(error)) from None
        if len(body) > max_bytes:
            raise Refused(200, f"the answer has more than {max_bytes} bytes")
        return body


def origin_of(url: str) -> tuple[str, str]:
    """Scheme and host with port."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2].lower()


def _cause(error: Exception) -> str:
    """In one line, with what explains it: a certificate out of its time is mostly a clock that is wrong."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    said = " ".join(str(reason).split()) or type(error).__name__
    if "not yet valid" in said or "has expired" in said:
        said += f"; this host's clock says {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"
    if "WRONG_VERSION_NUMBER" in said:
        said += "; no TLS is spoken there: is it http:// or another port?"
    return said


def _readable(error: urllib.error.HTTPError) -> str:
    try:
        said = error.read(TOLD_BYTES).decode(errors="replace")
    except (OSError, HTTPException):
        said = ""
    return " ".join(said.split()) or error.reason
