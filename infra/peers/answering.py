"""How a peer's program talks with the benchmark: one JSON object a line on stdin, one answer a line on stdout.

{"job": "encrypt", "count": 200} calls the function of that name with the other fields as keywords. Answers are objects;
times in them are seconds. The program ends when its stdin does.
"""

import json
import sys
from collections.abc import Callable
from typing import Any


def answer(jobs: dict[str, Callable[..., dict[str, Any]]]) -> None:
    # What a library prints goes to stderr, so that stdout has answers only.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(jobs[request.pop("job")](**request)), file=answers, flush=True)
