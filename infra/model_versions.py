"""Model versions for people: what there is, what two of them differ in, the bytes of one.

A version is named TASK/ROUND or by a pin. Errors: UnknownVersion, MissingArtifact, TamperedArtifact, InvalidModel.
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from blocks.artifacts import ArtifactStore
from blocks.registry import Registry, UnknownVersion
from blocks.tables import ModelVersionRow
from contracts.task_spec import Start
from tasks.learning.models import decode_parameters


def show(registry: Registry, task_id: str | None, console: Console) -> None:
    """Print every version with its metrics, its parent and the pins that hold it."""
    names: dict[str, list[str]] = {}
    for row in registry.pins():
        if row.undone_at is None and (holding := registry.pinned(row.name)) is not None and holding.id == row.id:
            names.setdefault(row.version, []).append(row.name)
    table = Table("version", "accuracy", "loss", "parent", "published", "sha256", "pinned as")
    for version in registry.versions(task_id):
        published = "" if version.published_at is None else f"{version.published_at:%F %T} UTC"
        pinned = ", ".join(names.get(version.version, ()))
        described = (version.parent or "", published, version.sha256[:14], pinned)
        table.add_row(version.version, _accuracy(version), _loss(version), *described)
    console.print(table if table.row_count else "no model versions: run a task, or healchain reindex")


def compare(registry: Registry, store: ArtifactStore, first: str, second: str, console: Console) -> None:
    """Print two versions side by side, and the distance between their parameters where they have equally many."""
    one, other = registry.find_version(first), registry.find_version(second)
    table = Table("", one.version, other.version)
    table.add_row("accuracy", _accuracy(one), _accuracy(other))
    table.add_row("validation samples", str(one.total), str(other.total))
    table.add_row("loss", _loss(one), _loss(other))
    table.add_row("parent", one.parent or "", other.parent or "")
    table.add_row("published", *("yes" if version.is_published else "no" for version in (one, other)))
    table.add_row("transaction", one.transaction or "", other.transaction or "")
    table.add_row("sha256", one.sha256, other.sha256)
    console.print(table)
    a, b = (decode_parameters(read(store, version)) for version in (one, other))
    if a.size != b.size:
        console.print(f"different architectures: {a.size} and {b.size} parameters")
        return
    distance, changed = float(np.linalg.norm(a.astype(float) - b)), int((a != b).sum())
    console.print(f"{changed} of {a.size} parameters differ, distance {distance:.6g} (L2)")
    console.print(f"common ancestor: {common_ancestor(registry, one, other) or 'none'}")


def common_ancestor(registry: Registry, one: ModelVersionRow, other: ModelVersionRow) -> str | None:
    """The newest version that both were trained from, itself included; or None."""
    mine = lineage(registry, one)
    return next((version for version in lineage(registry, other) if version in mine), None)


def lineage(registry: Registry, version: ModelVersionRow) -> list[str]:
    """A version and all that it was trained from, newest first."""
    found = [version.version]
    while version.parent is not None and version.parent not in found:
        found.append(version.parent)
        try:
            version = registry.find_version(version.parent)
        except UnknownVersion:
            break
    return found


def fetch(registry: Registry, store: ArtifactStore, name: str, out: Path) -> ModelVersionRow:
    """Write a version's bytes to a file, all of them or nothing, when they have its digest."""
    version = registry.find_version(name)
    data = read(store, version)
    draft = out.with_name(f".{out.name}.draft")
    draft.write_bytes(data)
    draft.replace(out)
    return version


def read(store: ArtifactStore, version: ModelVersionRow) -> bytes:
    """The bytes of a version. Raises MissingArtifact or TamperedArtifact."""
    return store.get(Start(uri=version.uri, sha256=version.sha256).owner, version.sha256)


def start_in_toml(version: ModelVersionRow) -> str:
    return f'[model.start]\nuri = "{version.uri}"\nsha256 = "{version.sha256}"'


def _accuracy(version: ModelVersionRow) -> str:
    return f"{version.correct / version.total:.4f}" if version.total else ""


def _loss(version: ModelVersionRow) -> str:
    return "" if version.loss_micro is None else f"{version.loss_micro / 1e6:.4f}"
