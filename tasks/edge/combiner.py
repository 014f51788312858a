"""Combine the updates of a round in a process of its own: a rule that hangs, or takes all memory, harms nobody else.

A job and its answer are a line of JSON and then safetensors. `python -m tasks.edge.combiner` reads one and writes the other.

Errors: AggregatorAway, NotCombinable.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.edge.wire import decode_tensors, encode_tensors
from tasks.learning.combining import InvalidRule, NotCombinable, Part, Tensors, combine

BASE, STATE, PART, MODEL = (
    "base ",
    "state ",
    "part ",
    "model ",
)  # beginnings of names; a name of a tensor may be anything


class AggregatorAway(ConnectionError):
    """The aggregator did not answer in time; the message says why. It can be asked again."""


def combine_in_child(
    rule: str, options: Mapping[str, Any], base: Tensors, state: Tensors, parts: Sequence[Part], timeout_s: float
) -> tuple[Tensors, Tensors]:
    """The model and the state; the process is ended after timeout_s. Raises AggregatorAway or NotCombinable."""
    job = encode_job(rule, options, base, state, parts)
    command = [sys.executable, "-m", "tasks.edge.combiner"]
    try:
        done = subprocess.run(command, input=job, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise AggregatorAway(f"no answer within {timeout_s:g} s") from None
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        raise AggregatorAway(f"the combining process ended: {last[0][:300]}")
    return decode_answer(done.stdout)


def encode_job(rule: str, options: Mapping[str, Any], base: Tensors, state: Tensors, parts: Sequence[Part]) -> bytes:
    head = {
        "rule": rule,
        "options": dict(options),
        "senders": [part.sender for part in parts],
        "samples": [part.samples for part in parts],
    }
    tensors = {BASE + name: one for name, one in base.items()} | {STATE + name: one for name, one in state.items()}
    for place, part in enumerate(parts):
        tensors |= {f"{PART}{place} {name}": one for name, one in part.tensors.items()}
    return json.dumps(head).encode() + b"\n" + encode_tensors(tensors)


def run_job(job: bytes) -> bytes:
    """The answer to a job: the model and the state, or why there are none."""
    head, _, data = job.partition(b"\n")
    asked = json.loads(head)
    tensors = decode_tensors(data)
    parts = [
        Part(sender, samples, _with_prefix(tensors, f"{PART}{place} "))
        for place, (sender, samples) in enumerate(zip(asked["senders"], asked["samples"], strict=True))
    ]
    try:
        base, state = _with_prefix(tensors, BASE), _with_prefix(tensors, STATE)
        model, after = combine(asked["rule"], base, parts, state, asked["options"])
    except (InvalidRule, NotCombinable) as error:
        return json.dumps({"error": str(error)}).encode() + b"\n"
    found = {MODEL + name: one for name, one in model.items()} | {STATE + name: one for name, one in after.items()}
    return b"{}\n" + encode_tensors(found)


def decode_answer(answer: bytes) -> tuple[Tensors, Tensors]:
    """The model and the state. Raises NotCombinable with what the rule said; ValueError for an answer that is none."""
    head, _, data = answer.partition(b"\n")
    if error := json.loads(head).get("error"):
        raise NotCombinable(error)
    tensors = decode_tensors(data)
    return _with_prefix(tensors, MODEL), _with_prefix(tensors, STATE)


def _with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}


if __name__ == "__main__":
    sys.stdout.buffer.write(run_job(sys.stdin.buffer.read()))
