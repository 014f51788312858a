"""How the processes of a host find Prefect's server and are let in: a profile in the home, mode 0600.

With PREFECT_HOME=HOME/prefect, `prefect worker start` and everything that it starts use it.
"""

import json
from pathlib import Path

from blocks.identity import write_secret

SETTINGS = {
    "PREFECT_WORKER_QUERY_SECONDS": "1",  # a step begins within a second of being asked for
    "PREFECT_WORKER_HEARTBEAT_SECONDS": "10",  # a worker that is gone is seen as gone within half a minute
    "PREFECT_WORKER_ENABLE_CANCELLATION": "true",  # what is cancelled in the UI ends on its host
    "PREFECT_CLIENT_MAX_RETRIES": "8",  # a server that restarts is waited for
    # Each process of a step would ask for both several times. The API takes a password, not a browser's cookies.
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.5",  # a process ends when its last batch is sent
}


def write_profile(home: Path, api_url: str, login: str) -> None:
    """Prefect's settings for the processes of this home. login: user:password of its API, if it asks for one."""
    folder = home / "prefect"
    folder.mkdir(mode=0o700, exist_ok=True)
    access = {"PREFECT_API_AUTH_STRING": login} if login else {}
    settings = {"PREFECT_API_URL": api_url, **access, **SETTINGS}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    write_secret(folder / "profiles.toml", "\n".join(['active = "healchain"', "", "[profiles.healchain]", *lines, ""]))
