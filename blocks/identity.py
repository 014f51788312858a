"""Who I am: one actor's home folder, with its encrypted keys, its data and its private state.

    keystore/wallet.json, keystore/encryption.json   Ethereum keystore files (scrypt, AES-128-CTR, keccak MAC)
    passphrase                                       opens both; mode 0600; may be elsewhere (a mounted secret)
    data.npz or any path in data.link                the actor's own samples
    transactions.sqlite                              what its account sends (contracts.journal)
    connections.json                                 its chain, its store, its name (blocks.connections)
    workload-limits.json                             the most that a task's WebAssembly module may use here (tasks.workload)
    compiled/                                        its machine code
    private/<task>/...                               what must survive a restart: residual, salts, prepared updates
    runs/<run id>                                    which process is at work on a run (infra.at_work)

The keys do not leave this module: it signs, agrees on shared secrets and opens what was sealed to the actor.
Errors: WrongPassphrase, InvalidHome.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast

from eth_account import Account
from eth_account.signers.local import LocalAccount
from prefect.blocks.core import Block
from pydantic import Field

from blocks.artifacts import sync_folder
from contracts.messages import Address, Bytes, Domain, KeyPossession, Membership, Message, sign
from tasks.crypto import ecies, ndd_fe

# scrypt work factor: the passphrase that `create_home` makes has 256 random bits, so stretching adds little.
SCRYPT_N = 2**13


class InvalidHome(ValueError):
    """The home folder lacks something; the message says what."""


class WrongPassphrase(ValueError):
    """The passphrase does not open the keystore."""


class Identity(Block):
    """An actor's home folder."""

    _block_type_name = "HealChain identity"
    _block_type_slug = "healchain-identity"
    _description = "The path of an actor's home folder on its own host. Holds no key."

    home: str = Field(description="the actor's home folder on its own host")

    @property
    def address(self) -> Address:
        return str(self.account.address)

    @property
    def account(self) -> LocalAccount:
        """Signs transactions and messages."""
        return _open_keystore(self.home, "wallet")

    @property
    def journal_path(self) -> Path:
        """Where this account's transactions are written before they are sent."""
        return Path(self.home) / "transactions.sqlite"

    @property
    def encryption_key(self) -> Bytes:
        """Public encryption key: 33 bytes, compressed."""
        return "0x" + ecies.public_key(self._scalar).hex()

    @property
    def _scalar(self) -> int:
        return int.from_bytes(_open_keystore(self.home, "encryption").key, "big")

    def sign(self, message: Message | Membership, domain: Domain) -> Bytes:
        return sign(message, domain, bytes(self.account.key))

    def sign_as_key_owner(self, message: KeyPossession, domain: Domain) -> Bytes:
        """Signed with the encryption key, which signs nothing else."""
        return sign(message, domain, _open_keystore(self.home, "encryption").key)

    def mask_key(
        self, peer: Bytes, role: Literal["publisher", "aggregator"], label: ndd_fe.Label, salt: Bytes
    ) -> bytes:
        """K_iP or K_iA: known to this actor and the owner of the public key `peer` only."""
        return ndd_fe.mask_key(self._shared_secret(bytes.fromhex(peer[2:])), role, label, bytes.fromhex(salt[2:]))

    def open_sealed(self, sealed: bytes, context: bytes) -> bytes:
        """What somebody sealed to this actor. Raises ecies.Unopenable."""
        own = bytes.fromhex(self.encryption_key[2:])
        return ecies.open_sealed(sealed, self._shared_secret, recipient_key=own, context=context)

    def _shared_secret(self, peer: bytes) -> bytes:
        return ecies.shared_secret(self._scalar, peer)

    def data_path(self) -> Path:
        """The actor's samples: the path written in `data.link`, or `data.npz` in the home."""
        link = Path(self.home) / "data.link"
        path = Path(link.read_text().strip()) if link.exists() else Path(self.home) / "data.npz"
        if not path.exists():
            raise InvalidHome(f"{path}: no such file or folder. Put the actor's data there, or its path into {link}")
        return path

    def read_private(self, name: str) -> bytes | None:
        path = Path(self.home) / "private" / name
        return path.read_bytes() if path.exists() else None

    def known_tasks(self) -> list[str]:
        """Ids of the tasks that this actor has signed anything for, in order."""
        return sorted(found.parent.name for found in (Path(self.home) / "private").glob("*/signed"))

    def claim(self, name: str, data: bytes) -> bytes:
        """The first bytes ever kept under this name: these, or those of an earlier call, also one that runs at the same time.

        What must be decided once (which key of a round, which update under which salt, what was signed) is claimed before
        it is acted on. A kill leaves all of it or nothing.
        """
        path = Path(self.home) / "private" / name
        if path.exists():
            return path.read_bytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(draft, path)
                sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)
        return path.read_bytes()

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Nobody else, thread or process, decides in this home meanwhile. Not to be nested."""
        with (Path(self.home) / "deciding.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a kill
            yield


def create_home(home: Path) -> Identity:
    """A home with two fresh keys and a passphrase file; an existing one is left as it is."""
    (home / "keystore").mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    passphrase_file = home / "passphrase"
    if not passphrase_file.exists():
        write_secret(passphrase_file, secrets.token_hex(32))
    for name in ("wallet", "encryption"):
        keystore = home / "keystore" / f"{name}.json"
        if not keystore.exists():
            account = Account.create(secrets.token_hex(32))
            encrypted = account.encrypt(passphrase_file.read_text(), kdf="scrypt", iterations=SCRYPT_N)
            write_secret(keystore, json.dumps(encrypted))
    return Identity(home=str(home))


def _open_keystore(home: str, name: str) -> LocalAccount:
    keystore = Path(home) / "keystore" / f"{name}.json"
    passphrase = Path(home) / "passphrase"
    for needed in (keystore, passphrase):
        if not needed.exists():
            raise InvalidHome(f"{needed} is missing: restore it from a backup, or make a new home")
    try:
        return _decrypt(keystore.read_text(), passphrase.read_text())
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InvalidHome(f"{keystore} is no keystore: restore it from a backup") from error
    except ValueError as error:
        raise WrongPassphrase(f"{passphrase} does not open {keystore}: {error}") from error


@lru_cache(maxsize=256)
def _decrypt(keystore: str, passphrase: str) -> LocalAccount:
    """Stretching takes a tenth of a second, so a process does it once for each key it uses."""
    account: LocalAccount = Account.from_key(Account.decrypt(keystore, passphrase))
    return account


residents: dict[str, Identity] = {}
"""The actors whose homes this process was started for."""


def find_identity(actor: str) -> Identity:
    """An actor by its name: one of this process, or the home that Prefect's block of that name gives (a cluster's worker)."""
    return residents[actor] if actor in residents else cast(Identity, Identity.load(actor))


def write_secret(path: Path, text: str) -> None:
    """Replace a file of the home, as a whole, readable by its owner only."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
