"""Loaded by every Python process of a stack under test: strikes a step's process at a named call, once.

``fault.json`` beside this file says where: {"process": regular expression on the name of the step's process, "call":
"module:function" or "module:Class.method", "nth": of how many calls, "when": "before" or "after", "do": "kill-step",
"kill-worker" or "wait"}. What was struck leaves ``struck`` there; "wait" goes on when ``go`` is there.
"""

import json
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import sys
import time
from functools import wraps
from pathlib import Path

HERE = Path(__file__).parent
LONGEST_WAIT_S = 180


class _Anchor:
    """What multiprocessing remembers the hook by."""


_anchor = _Anchor()


def _arm(_):
    try:
        fault = json.loads((HERE / "fault.json").read_text())
    except FileNotFoundError:
        return
    if not re.search(fault["process"], multiprocessing.current_process().name) or (HERE / "struck").exists():
        return
    module, _, path = fault["call"].partition(":")
    *owner, name = path.split(".")
    holder = sys.modules[module]
    for part in owner:
        holder = getattr(holder, part)
    setattr(holder, name, _struck(getattr(holder, name), fault))


def _struck(function, fault):
    calls = 0

    @wraps(function)
    def run(*args, **options):
        nonlocal calls
        calls += 1
        if calls == fault["nth"] and fault["when"] == "before":
            _strike(fault["do"])
        result = function(*args, **options)
        if calls == fault["nth"] and fault["when"] == "after":
            _strike(fault["do"])
        return result

    return run


def _strike(what):
    try:
        os.close(os.open(HERE / "struck", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if what == "kill-step":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "kill-worker":  # it, its other steps, and what they are forked from
        os.killpg(os.getpgrp(), signal.SIGKILL)
    ends = time.monotonic() + LONGEST_WAIT_S
    while not (HERE / "go").exists() and time.monotonic() < ends:
        time.sleep(0.05)


multiprocessing.util.register_after_fork(_anchor, _arm)
