"""The synthetic round of the benchmark: right, in bounded memory, and gone from the disk afterwards."""

import json
import tracemalloc
from collections.abc import Callable
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from infra import stream
from infra.stream import Round, WrongSum
from tasks import chunks
from tasks.chunks import Layout, put_manifest
from tasks.contribute import Ciphertext
from tasks.crypto import ndd_fe
from tasks.global_model import Opening, store_opening


def quiet() -> Console:
    return Console(file=StringIO())


@pytest.fixture
def small(tmp_path, monkeypatch) -> Round:
    """Three miners, 1 000 coordinates in chunks of 64, the last one of 40; pieces of 2 chunks, groups of 4."""
    monkeypatch.setattr(chunks, "PIECE_COORDINATES", 128)
    monkeypatch.setattr(chunks, "GROUP_COORDINATES", 256)
    return Round.set_up(tmp_path, Layout(1000, 64), miners=3, threads=2, console=quiet())


def test_it_is_written_measured_and_cleaned_up(tmp_path):
    out = tmp_path / "build" / "stream.json"
    result = stream.run(out, quiet(), dimension=20_000, miners=3, chunk_coordinates=1024)
    assert json.loads(out.read_text()) == result
    assert list(out.parent.iterdir()) == [out]
    assert set(result["seconds"]) == {"encrypt", "derive key", "audit", "open", "verify"}
    assert min(result["seconds"].values()) > 0
    assert result["verified_chunks"] == 20
    largest = 3 * ndd_fe.encoded_size(1024) * 20 + 20_000 * (32 + 40) + 20 * 200 + 5 * 1000
    assert result["stored_bytes"] <= largest
    assert result["bytes_per_parameter"] == round(result["stored_bytes"] / 20_000, 2)
    assert result["peak_memory_bytes"] >= result["imported_memory_bytes"] > 0


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"dimension = 1000000000000000 with 5 miners needs .* GB in") as refused:
        stream.run(tmp_path / "stream.json", quiet(), dimension=10**15)
    assert "lower it, or write elsewhere" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_the_opened_sum_is_that_of_the_updates_and_a_voter_finds_it_right(small):
    ciphertexts, key = small.encrypt(), small.derive_key()
    small.audit(ciphertexts)
    opening = small.open(ciphertexts, key)
    assert small.verify(ciphertexts, opening) == 16
    assert small.verify(ciphertexts, opening, spot_chunks=3) == 3
    small.compare(opening)


def test_an_opening_with_one_wrong_number_is_found_wrong(small):
    ciphertexts, key = small.encrypt(), small.derive_key()
    opening = small.open(ciphertexts, key)
    weighted_sum, blinding = opening.opened(opening.layout.chunks)
    weighted_sum[777] += 1
    digests = store_opening(small.store, opening.owner, small.layout, weighted_sum, blinding)
    sha256 = put_manifest(small.store, opening.owner, small.layout, digests)
    wrong = Opening.listed(small.store, opening.owner, sha256, size=64, at_most=1000)
    with pytest.raises(WrongSum, match="does not hold at coordinate 777"):
        small.verify(ciphertexts, wrong)
    with pytest.raises(WrongSum, match="coordinate 777 was opened to another number"):
        small.compare(wrong)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that arrays and Python objects took during some work, beyond what there was."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_pieces_not_of_the_round(tmp_path, monkeypatch):
    """Eight ciphertexts of 74 MB in all go through less than a quarter of that, in every part and for every party."""
    monkeypatch.setattr(chunks, "PIECE_COORDINATES", 2048)
    # Tables of multiples are made once a process, and belong to no round.
    first = Round.set_up(tmp_path / "first", Layout(2048, 1024), miners=8, threads=1, console=quiet())
    first.verify(*opened(first))

    work = Round.set_up(tmp_path / "large", Layout(192_000, 1024), miners=8, threads=1, console=quiet())
    limit = 8 * 48 * 192_000 // 4
    made: dict[str, Any] = {}
    parts = {
        "encrypt": lambda: made.update(ciphertexts=work.encrypt()),
        "derive key": lambda: made.update(key=work.derive_key()),
        "audit": lambda: projected(made["ciphertexts"][0]),
        "open": lambda: made.update(opening=work.open(made["ciphertexts"], made["key"])),
        "verify": lambda: work.verify(made["ciphertexts"], made["opening"]),
    }
    peaks = {name: peak_bytes(part) for name, part in parts.items()}
    assert max(peaks.values()) < limit, peaks
    work.compare(made["opening"])


def projected(ciphertext: Ciphertext) -> list[int]:
    """An audit but for its table of baby steps, which is as large as the bound asks for, whatever the ciphertext."""
    signs = np.ones((2, ciphertext.layout.coordinates), np.int8)
    key = ndd_fe.derive_projection_key(bytes(32), signs)
    return ndd_fe.failing_projections(ciphertext.pieces(lambda _: None), signs, np.zeros(2, np.int64), key)


def opened(work: Round) -> tuple[list[Ciphertext], Opening]:
    ciphertexts = work.encrypt()
    return ciphertexts, work.open(ciphertexts, work.derive_key())
