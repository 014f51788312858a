"""All parties of a task on one machine, each in a home of its own: for development, tests and a first look.

    DIR/actors/<name>/      homes: keys, data, private state
    DIR/store/              artifacts and signed records
    DIR/chain.sqlite       the in-process chain
    DIR/registry.sqlite     the index
    DIR/prefect/            Prefect's own temporary server keeps its database here

Setting up twice changes nothing: a run that was killed finds its parties, its chain and its money as they were.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from eth_account import Account
from pydantic import SecretStr
from web3 import Web3

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.connections import Connections
from blocks.identity import Identity, create_home, residents
from blocks.local_chain import GENESIS_KEYS
from blocks.registry import Registry
from contracts import bindings
from contracts.sending import Sender
from contracts.task_spec import DatasetRequirement
from deployments.register import register_homes
from tasks.learning.datasets import Dataset, decode_idx, dirichlet_partition, encode_npz, load_ready, split

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package of it has the files
VALIDATION_SHARE = 0.3
LABEL_SKEW_ALPHA = 0.5
ALLOWANCE_WEI = 10**19
MOST_WEI = 2**88 - 1  # all that a task can ask for: coins of a development chain are worth nothing


@dataclass(frozen=True)
class Stack:
    """A set-up folder: its blocks, and each actor's home by name; the publisher is `publisher`."""

    folder: Path
    chain: Chain
    artifacts: ArtifactStore
    registry: Registry
    homes: dict[str, Path]

    def identity(self, name: str) -> Identity:
        return Identity(home=str(self.homes[name]))

    def register(self) -> None:
        """Save the homes' places with the Prefect server in use."""
        register_homes(self.homes)


def set_up(folder: Path, requirement: DatasetRequirement, miners: int, seed: int, data: dict[str, Path]) -> Stack:
    """Homes with keys and data, a chain with the contracts, money for everybody, an empty registry.

    data: paths of the parties' own data by actor name; without any, a ready data set is split among them.
    Raises ValueError naming the actor whose data is missing.
    """
    names = ["publisher", *(f"miner-{number}" for number in range(1, miners + 1))]
    folder.mkdir(parents=True, exist_ok=True)
    homes = {name: folder / "actors" / name for name in names}
    identities = {name: create_home(home) for name, home in homes.items()}
    give_data(homes, requirement, seed, data)

    chain = _deploy(folder)
    fund(chain, [identity.address for identity in identities.values()], folder / "faucet.sqlite")
    store = ArtifactStore(root=str(folder / "store"))
    registry = Registry(url=SecretStr(f"sqlite:///{folder / 'registry.sqlite'}"))
    publishers = (identities["publisher"].address,)
    for name, identity in identities.items():
        is_publisher = name == "publisher"
        registry.record_actor(name, identity.address, "publisher" if is_publisher else "miner")
        Connections(
            name=name,
            chain=chain,
            store=store,
            registry=registry if is_publisher else None,
            publishers=publishers,
            most_stake_wei=MOST_WEI,
            most_deposit_wei=MOST_WEI,
        ).pin(identity)
    residents.update(identities)
    return Stack(folder, chain, store, registry, homes)


def give_data(homes: dict[str, Path], requirement: DatasetRequirement, seed: int, data: dict[str, Path]) -> None:
    """Write each actor's samples, or the path of its own, into its home; only where there is none yet."""
    if unknown := sorted(set(data) - set(homes)):
        raise ValueError(f"--data {unknown[0]}=...: no such actor; there are {', '.join(homes)}")
    for name, path in data.items():
        if not path.exists():
            raise ValueError(f"--data {name}={path}: no such file or folder")
        (homes[name] / "data.link").write_text(str(path.resolve()))
    without = [name for name, home in homes.items() if not (home / "data.link").exists()]
    if not without or all((homes[name] / "data.npz").exists() for name in without):
        return
    if requirement.name not in READY_DATASETS:
        raise ValueError(
            f"dataset.name = {requirement.name!r} is no ready data set ({', '.join(READY_DATASETS)}): give every actor "
            f"its own by --data NAME=PATH; missing for {', '.join(without)}"
        )
    if data:
        raise ValueError(f"--data is given for {', '.join(data)} but not for {', '.join(without)}: give all or none")
    for name, part in ready_parts(requirement, len(homes) - 1, seed).items():
        draft = homes[name] / ".data.npz"
        draft.write_bytes(encode_npz(part))
        draft.replace(homes[name] / "data.npz")


def ready_parts(requirement: DatasetRequirement, miners: int, seed: int) -> dict[str, Dataset]:
    """A ready data set by actor name: a validation set for the publisher, label-skewed (Dirichlet) parts for the miners."""
    train, validation = READY_DATASETS[requirement.name](seed)
    parts = dirichlet_partition(train.labels, miners, LABEL_SKEW_ALPHA, seed, requirement.samples_min)
    named = {f"miner-{number}": train.take(indices) for number, indices in enumerate(parts, start=1)}
    return {"publisher": validation, **named}


def _packaged(name: str, seed: int) -> tuple[Dataset, Dataset]:
    """(train, validation) of a data set that is installed with scikit-learn, divided by the seed."""
    return split(load_ready(name), VALIDATION_SHARE, seed)


def _fashion_mnist(_seed: int) -> tuple[Dataset, Dataset]:
    """(train, validation): the 60 000 and the 10 000 images that the data set itself keeps apart."""
    train, validation = (
        decode_idx(_read_idx(f"{part}-images-idx3-ubyte.gz"), _read_idx(f"{part}-labels-idx1-ubyte.gz"), classes=10)
        for part in ("train", "t10k")
    )
    return train, validation


def _read_idx(name: str) -> bytes:
    path = FASHION_MNIST / name
    if not path.is_file():
        raise ValueError(
            f"dataset.name = 'fashion-mnist': {path} is missing. On Debian: apt-get install -y dataset-fashion-mnist; or "
            "give every actor images of its own by --data NAME=PATH, a MedMNIST-style .npz"
        )
    return path.read_bytes()


READY_DATASETS: dict[str, Callable[[int], tuple[Dataset, Dataset]]] = {
    "breast-cancer": partial(_packaged, "breast-cancer"),
    "digits": partial(_packaged, "digits"),
    "fashion-mnist": _fashion_mnist,
}


def _deploy(folder: Path) -> Chain:
    """The chain of this folder with the contracts on it; deployed once, checked every time."""
    chain, note = Chain(rpc=f"local:{folder / 'chain.sqlite'}"), folder / "deployment.json"
    if note.exists():
        deployment = bindings.Deployment(**json.loads(note.read_text()))
        bindings.check_deployment(chain.web3, deployment)
    else:
        deployment = bindings.deploy(chain.sender(Account.from_key(GENESIS_KEYS[0]), folder / "deployer.sqlite"))
        draft = folder / ".deployment.json"
        draft.write_text(json.dumps(asdict(deployment)))
        draft.replace(note)
    return chain.deployed(deployment)


def fund(chain: Chain, addresses: list[str], journal: Path) -> None:
    """Give every new wallet its allowance of the local chain's own coins."""
    give_allowances(chain.sender(Account.from_key(GENESIS_KEYS[1]), journal), addresses)


def give_allowances(faucet: Sender, addresses: list[str]) -> None:
    """Send every wallet that never had money its allowance."""
    web3 = faucet.web3
    for address in addresses:
        account = Web3.to_checksum_address(address)
        if web3.eth.get_balance(account) == 0 and web3.eth.get_transaction_count(account) == 0:
            faucet.send(b"", to=address, value_wei=ALLOWANCE_WEI, purpose="allowance")


def archive(folder: Path, name: str) -> Path:
    """Move a finished run aside, beside its folder. Returns where it is now."""
    target = folder.with_name(f"{folder.name}-{name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}-{name}-{number}")
    shutil.move(folder, target)
    return target
