"""Every test of the folder runs once on each backend that this machine has; a machine without IFMA runs all with `portable`."""

from collections.abc import Iterator
from contextlib import suppress

import pytest

from tasks.crypto import backend, bsgs, pedersen
from tasks.crypto.backend import Choice

CHOICES = [backend.choose("portable")]
with suppress(backend.WrongBackend):
    CHOICES.append(backend.choose("ifma"))


@pytest.fixture(scope="module", autouse=True, params=CHOICES, ids=[choice.name for choice in CHOICES])
def chosen(request: pytest.FixtureRequest) -> Iterator[Choice]:
    """The backend at work. A fixture that keeps points must ask for it, so that each backend makes its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "CHOICE", request.param)
        forget_tables()
        yield request.param
    forget_tables()


def forget_tables() -> None:
    """Tables are built by the backend at work, too."""
    for cached in (pedersen._commitments, bsgs._baby_steps, bsgs._giants):
        cached.cache_clear()
