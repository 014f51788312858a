"""What a person sees of a step in the Prefect UI: tables and markdown beside the run that made them.

Outside a run there is no page to put them on, and nothing is made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact
from prefect.context import FlowRunContext


def show_table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A table; `key` in lower case, digits and dashes names its history over the runs."""
    if FlowRunContext.get() is not None:
        create_table_artifact([dict(row) for row in rows], key=key, description=description)


def show_markdown(key: str, text: str, description: str) -> None:
    if FlowRunContext.get() is not None:
        create_markdown_artifact(text, key=key, description=description)


def show_progress(key: str, percent: float, description: str) -> None:
    """How far something is, e.g. accuracy so far against the required one; 0 <= percent <= 100."""
    if FlowRunContext.get() is not None:
        create_progress_artifact(percent, key=key, description=description)
