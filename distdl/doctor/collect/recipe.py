"""What a recipe asks of the machine."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distdl.capabilities import engine_of
from distdl.checkpoint.manifest import Manifest
from distdl.checkpoint.read import find_latest
from distdl.data.description import access_of, describe_data
from distdl.doctor.facts import Wanted
from distdl.errors import CheckpointError, DistdlError
from distdl.plan import make_plan
from distdl.recipe import Recipe, mathematics, recipe_hash
from distdl.record import RunDirectory
from distdl.topology import Topology

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
PATIENCE_S = 5.0


@dataclass(frozen=True)
class Asked:
    """A recipe, and the file it was read from."""

    name: str
    recipe: Recipe

    @cached_property
    def directory(self) -> RunDirectory:
        """Its run directory; nothing is created."""
        return RunDirectory.of(self.recipe)

    def wanted(self, topology: Topology) -> Wanted:
        """What it needs here. Reads indexes of data and of checkpoints; imports no torch."""
        recipe = self.recipe
        engine, device = str(recipe.hardware.engine), str(recipe.hardware.device)
        data_error = plan_error = fingerprint = None
        try:
            info = describe_data(recipe.data, access_of(_impatient(recipe)))
        except (DistdlError, OSError) as error:
            data_error = str(error)
        else:
            fingerprint = info.fingerprint
            try:
                planned = make_plan(recipe, topology, info)
                engine, device = engine_of(recipe, topology.accelerate), planned.device
            except DistdlError as error:
                plan_error = str(error)
        last = self._last_save()
        missing = [module for module, files in self._modules.items() if files is None]
        return Wanted(
            recipe=self.name,
            hash=recipe_hash(recipe),
            engine=engine,
            device=device,
            precision=recipe.train.precision,
            workers=recipe.hardware.workers,
            keep=recipe.checkpoint.keep,
            save=sum(file.size for file in last.files.values()) if last else None,
            changed=tuple(last.what_changed(mathematics(recipe), fingerprint))
            if last and fingerprint
            else (),
            data=fingerprint,
            replicas=recipe.checkpoint.replicas == "node",
            compile=recipe.hardware.compile,
            threads=recipe.hardware.threads if isinstance(recipe.hardware.threads, int) else None,
            plan_error=plan_error,
            data_error=data_error,
            code_error=f"no module {', '.join(missing)} in {Path.cwd()} or installed" if missing else None,
        )

    def _last_save(self) -> Manifest | None:
        place = self.directory.checkpoints
        if not isinstance(place, Path) or not place.is_dir():
            return None
        try:
            return find_latest(place, verify=False).manifest
        except (CheckpointError, OSError):
            return None

    @property
    def code_files(self) -> dict[str, tuple[list[Path], Path]]:
        """Module of the user's own that the recipe names -> its Python files, and the folder they are in."""
        return {module: files for module, files in self._modules.items() if files is not None and files[0]}

    @cached_property
    def _modules(self) -> dict[str, tuple[list[Path], Path] | None]:
        """Top-level module -> its files; none for what is installed, None where it cannot be found."""
        tops = {
            name.partition(":")[0].partition(".")[0]
            for name in _import_paths(self.recipe.model_dump(mode="json"))
        }
        return {top: _files_of(top) for top in sorted(tops)}


def _impatient(recipe: Recipe) -> Recipe:
    """A doctor says what is wrong now; a run waits for a server to come back."""
    hardware = recipe.hardware.model_copy(update={"retry_s": PATIENCE_S})
    return recipe.model_copy(update={"hardware": hardware})


def _import_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("name", "transform") and isinstance(item, str) and IMPORT_PATH.fullmatch(item):
                yield item
            else:
                yield from _import_paths(item)


def _files_of(top: str) -> tuple[list[Path], Path] | None:
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as when the recipe's own names are imported
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    folders, origin = list(spec.submodule_search_locations or ()), Path(spec.origin or "built-in")
    base = Path(folders[0]) if folders else origin.parent
    if {"site-packages", "dist-packages"} & set(base.parts) or not base.is_absolute():
        return [], base
    return (sorted(base.rglob("*.py")) if folders else [origin]), base
