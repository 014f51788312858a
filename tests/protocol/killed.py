"""Run `healchain` and kill it (SIGKILL, nothing is flushed) at its N-th durable write: python -m tests.protocol.killed N ...

Every file that a party relies on is synced to disk before it gets its name, so "the N-th sync" walks through every step,
standing between a transaction and the record of it, between a training and its submission, and so on.
"""

import os
import signal
import sys

from infra.cli import app


def main() -> None:
    left = int(sys.argv[1])
    real = os.fsync

    def sync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = sync
    app(sys.argv[2:])


if __name__ == "__main__":
    main()
