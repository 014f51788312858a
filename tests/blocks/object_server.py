"""A real S3 server on this machine: the one of the development stack, on a free loopback port."""

import os
import secrets
import signal
import subprocess
from pathlib import Path

from blocks.artifacts import ArtifactStore
from infra.object_store import (
    admit,
    format_volume,
    free_port,
    gateway_command,
    gateway_environment,
    make_bucket,
    wait_until_ready,
)


class ObjectServer:
    """A server that can be killed and started again on its port; data and accounts outlive that in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.access_key, self.secret_key = "administrator", secrets.token_urlsafe(20)
        format_volume(folder)
        self.start()
        self.wait()

    def start(self) -> None:
        environment = gateway_environment(self.folder, self.access_key, self.secret_key)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                gateway_command(self.folder, self.port),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        wait_until_ready(self._root("any-bucket"))

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(20)

    def memory_kb(self) -> int:
        """Memory that the server's process occupies."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def store(self) -> ArtifactStore:
        """A new bucket, with the administrator's keys."""
        root = self._root(f"bucket-{os.getpid()}-{secrets.token_hex(6)}")
        make_bucket(root)
        return root

    def account(self, root: ArtifactStore, address: str, **settings: float) -> ArtifactStore:
        """The bucket as an actor sees it, who is admitted afresh."""
        access_key, secret_key = admit(root, address)
        return ArtifactStore(root=root.root, access_key=access_key, secret_key=secret_key, **settings)

    def _root(self, bucket: str) -> ArtifactStore:
        url = f"http://127.0.0.1:{self.port}/{bucket}"
        return ArtifactStore(root=url, access_key=self.access_key, secret_key=self.secret_key)
