"""Cluster profiles: files with keys of `launch.slurm`, so that people type what their cluster wants once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distdl.errors import RecipeError, nearest
from distdl.recipe import Recipe, load_recipe
from distdl.recipe.tree import Marked, parse_yaml

SHIPPED = Path(__file__).parents[1] / "profiles"
_DEFAULT = "default"


def own_profiles(env: Mapping[str, str]) -> Path:
    """The user's folder of profiles, by the XDG Base Directory Specification."""
    base = env.get("XDG_CONFIG_HOME") or f"{env.get('HOME', '~')}/.config"
    return Path(base).expanduser() / "distdl" / "profiles"


def load_with_profile(
    config: str, overrides: Sequence[str], env: Mapping[str, str]
) -> tuple[Recipe, Path | None]:
    """The recipe, laid over the profile it names or the user's default; and that profile's file.

    Raises RecipeError, also for a profile that is not there or says what it may not.
    """
    recipe = load_recipe(config, overrides)
    file = find_profile(recipe.launch.slurm.profile, own_profiles(env))
    if file is None:
        return recipe, None
    return load_recipe(config, overrides, beneath=_read(file)), file


def find_profile(name: str | None, own: Path) -> Path | None:
    """The file of a profile: a path, or a name in the user's folder or among those shipped.

    None for `name`: the user's default.yaml, or None where there is none. Raises RecipeError.
    """
    if name is None:
        default = own / f"{_DEFAULT}.yaml"
        return default if default.is_file() else None
    places = [Path(name)] if name.endswith(".yaml") else [own / f"{name}.yaml", SHIPPED / f"{name}.yaml"]
    for place in places:
        if place.is_file():
            return place
    known = sorted({p.stem for folder in (own, SHIPPED) for p in folder.glob("*.yaml")})
    raise RecipeError(
        f"launch.slurm.profile = {name!r}: no such profile{nearest(name, known) or ';'} "
        f"known: {', '.join(known)}; your own lie in {own}"
    )


def _read(file: Path) -> Marked:
    tree = parse_yaml(file.read_text(), lambda line: f"{file}:{line}") or Marked({}, str(file))
    if not isinstance(tree.value, dict):
        raise RecipeError(f"{tree.source}: expected keys of launch.slurm, such as partition: gpu")
    return Marked({"launch": Marked({"slurm": tree}, str(file))}, str(file))
