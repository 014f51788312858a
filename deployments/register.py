"""Set up what the flows find by name: the blocks of this installation. Doing it again changes nothing.

chain, artifacts, registry   where the chain, the store and the database are
<actor>                      the path of each actor's home on its own host
"""

from pathlib import Path

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.identity import Identity
from blocks.registry import Registry


def register_blocks(chain: Chain, artifacts: ArtifactStore, registry: Registry, homes: dict[str, Path]) -> None:
    """Save the blocks under the names that the flows use. Only paths and addresses; no key, no password."""
    chain.save("chain", overwrite=True)
    artifacts.save("artifacts", overwrite=True)
    registry.save("registry", overwrite=True)
    for name, home in homes.items():
        Identity(home=str(home)).save(name, overwrite=True)
