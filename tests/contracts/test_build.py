"""The committed builds are what the sources give, and nobody has power over the contracts."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from contracts.bindings import CONTRACTS, load_build

CONTRACTS_FOLDER = Path(__file__).parents[2] / "contracts"


def compile_check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["node", "compile.mjs", "--check"], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compiler() -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.fail("the contracts cannot be recompiled without node; install it: apt-get install -y nodejs npm")
    if not (CONTRACTS_FOLDER / "node_modules" / "solc").is_dir():
        subprocess.run(["npm", "ci", "--ignore-scripts"], cwd=CONTRACTS_FOLDER, check=True)


@pytest.mark.usefixtures("compiler")
def test_the_build_is_what_the_sources_give() -> None:
    result = compile_check(CONTRACTS_FOLDER)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.usefixtures("compiler")
def test_a_changed_source_or_build_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "contracts"
    # One contract is enough, and quick.
    for path in (
        "compile.mjs",
        "src/Task.sol",
        "src/Payment.sol",
        "src/HealChainEscrow.sol",
        "src/test/Recipients.sol",
        "build/HealChainEscrow.json",
        "build/IERC20.json",
        "build/IERC20Errors.json",
    ):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CONTRACTS_FOLDER / path, copy / path)
    (tmp_path / "tests" / "contracts" / "build").mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "build" / "Recipient.json", tmp_path / "tests" / "contracts" / "build")
    os.symlink(CONTRACTS_FOLDER / "node_modules", copy / "node_modules")
    assert compile_check(copy).returncode == 0

    source = copy / "src" / "HealChainEscrow.sol"
    source.write_text(source.read_text().replace("terms.minMiners < 3", "terms.minMiners < 2"))
    (copy / "build" / "Extra.json").write_text("{}")
    result = compile_check(copy)
    assert result.returncode == 1
    assert result.stdout.split("\n")[:2] == ["differs: build/Extra.json", "differs: build/HealChainEscrow.json"]


def test_the_lock_pins_contents_and_names_no_host() -> None:
    package = json.loads((CONTRACTS_FOLDER / "package.json").read_text())
    text = (CONTRACTS_FOLDER / "package-lock.json").read_text()
    assert "://" not in text
    packages = json.loads(text)["packages"]
    assert all("integrity" in entry for path, entry in packages.items() if path)
    for name, version in package["devDependencies"].items():
        assert packages[f"node_modules/{name}"]["version"] == version


def test_these_functions_change_the_chain_and_no_others() -> None:
    """No owner, no pause, no upgrade: whoever adds such a function has to add it here."""
    changing = {
        name: sorted(
            entry["name"]
            for entry in load_build(name)["abi"]
            if entry["type"] == "function" and entry["stateMutability"] in ("payable", "nonpayable")
        )
        for name in CONTRACTS
    }
    assert changing == {
        "HealChainEscrow": ["markPublished", "publishTask", "refundPublisher", "releaseReward"],
        "StakeRegistry": [
            "closeRegistration",
            "creditSlashed",
            "depositStake",
            "drawAggregator",
            "moveSeed",
            "releaseStake",
            "replaceAggregator",
            "requestWithdrawal",
            "resignAggregator",
            "slashEquivocation",
            "withdrawCredit",
            "withdrawStake",
        ],
        "BlockPublisher": ["publishBlock", "reportEquivocation"],
        "RewardDistribution": ["claimTo", "distribute", "openScores", "revealAccuracy", "revealScore", "withdrawTo"],
    }
