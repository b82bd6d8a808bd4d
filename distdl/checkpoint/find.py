"""Find the newest checkpoint that verifies, all ranks together: each hashes a share of its files."""

from __future__ import annotations

from distdl.checkpoint.folders import Folder, Place, child, folder_at
from distdl.checkpoint.manifest import Manifest, step_name
from distdl.checkpoint.read import Found, first_whole, inspect, listed, read_manifest, wrong_hashes
from distdl.checkpoint.sharing import share_out
from distdl.checkpoint.store import Store
from distdl.comm import World, together
from distdl.errors import CheckpointError, Corrupt, Incompatible, Incomplete


def find_and_verify(store: Store, world: World) -> Found:
    """Collective. As `read.find_latest`, with every byte read and hashed once, by one of the ranks.

    Raises CheckpointError on all ranks together.
    """
    steps = world.from_main(together(world, lambda: store.steps() if world.is_main else None))
    paths = [child(store.place, step_name(step)) for step in steps]
    return first_whole(store.place, paths, lambda path: _look(path, world))


def _look(path: Place, world: World) -> Manifest:
    """Collective. The manifest of a checkpoint that is whole; Incomplete or Corrupt on all ranks."""
    # Rank 0 alone decides on manifest and sizes, so that ranks cannot come to different ends here.
    told: list[str | None] = [None, None]
    if world.is_main:
        try:
            inspect(path, hashes=False)
        except (Incomplete, Corrupt, Incompatible) as error:
            told = [type(error).__name__, str(error)]
        except OSError as error:
            told = [Incomplete.__name__, str(error)]
    kind, reason = world.from_main(told)
    if kind is not None:
        raise {e.__name__: e for e in (Incomplete, Corrupt, Incompatible)}[kind](reason)
    manifest, folder = _read(path, world)
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    mine = share_out(sizes, [0] * world.size)[world.rank]
    found = together(world, lambda: wrong_hashes(folder, manifest, mine))
    wrong = {name: what for part in world.gather(found) for name, what in part.items()}
    if wrong:
        raise Corrupt(listed(wrong))
    return manifest


def _read(path: Place, world: World) -> tuple[Manifest, Folder]:
    """Collective. What rank 0 has found sound, on every rank. Raises CheckpointError on all of them."""
    try:
        return together(world, lambda: (read_manifest(path), folder_at(path)))
    except (Incomplete, Corrupt) as error:
        # Not of a kind that passes on to the next checkpoint: the other ranks have met a CheckpointError.
        raise CheckpointError(str(error)) from error
