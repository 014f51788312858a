"""Where an actor's larger steps are computed: a task runner of Prefect, by name, with its options.

Without a block of the name `<actor>-workers`, two threads of the actor's own process: the kernels let go of the
interpreter. A cluster is one block, saved once by the operator:

    Workers(runner="prefect_dask.DaskTaskRunner", options={"address": "tcp://scheduler:8786"}).save("miner-1-workers")

The host of every worker needs the actor's home and the blocks of this installation: keys are read where they are used.
"""

import importlib
from typing import Any, cast

from prefect.blocks.core import Block
from prefect.task_runners import TaskRunner
from pydantic import Field, ValidationError


class Workers(Block):
    """A task runner and its options."""

    _block_type_name = "HealChain workers"
    _block_type_slug = "healchain-workers"
    _description = "The Prefect task runner on which an actor opens sums: threads, Dask, Ray."

    runner: str = Field(
        default="prefect.task_runners.ThreadPoolTaskRunner", description="dotted name of a Prefect task runner"
    )
    options: dict[str, Any] = Field(default={"max_workers": 2}, description="its arguments")

    def task_runner(self) -> TaskRunner[Any]:
        """A task runner, not started. Raises ValueError naming what is wrong with `runner` or `options`."""
        module, _, name = self.runner.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"runner = {self.runner!r}: {error}; install its package or correct the name") from error
        if not (isinstance(kind, type) and issubclass(kind, TaskRunner)):
            raise ValueError(
                f"runner = {self.runner!r}: not a Prefect task runner, such as prefect_dask.DaskTaskRunner"
            )
        try:
            return kind(**self.options)
        except TypeError as error:
            raise ValueError(f"options = {self.options!r}: {error}; see the arguments of {self.runner}") from error


def load_workers(actor: str) -> Workers:
    """The actor's workers; two threads where the operator saved none. Raises ValidationError for a malformed block."""
    try:
        return cast(Workers, Workers.load(f"{actor}-workers"))
    except ValidationError:
        raise
    except ValueError:
        return Workers()
