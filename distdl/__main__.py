"""`python -m distdl`, for launchers that start a module: torchrun, srun, mpirun."""

import os
import sys
import traceback

EXIT_CODE = 3  # errors.ENVIRONMENT, which may not import either


def in_the_way(folder: str) -> str | None:
    """A file in `folder` that was imported in place of a module of Python itself, with that module's name."""
    for name in sorted(sys.stdlib_module_names & sys.modules.keys()):
        file = getattr(sys.modules[name], "__file__", None) or ""
        if os.path.dirname(os.path.abspath(file)) == folder or file == os.path.join(
            folder, name, "__init__.py"
        ):
            return f"{file} hides Python's own module {name}, which has the same name"
    return None


def main() -> None:
    """`distdl.cli.main`. `python -m` imports from the current folder first, whatever lies there."""
    try:
        from distdl.cli import main as run

        run()
    except (ImportError, AttributeError):
        found = in_the_way(os.path.abspath(sys.path[0]))
        if found is None:
            raise
        traceback.print_exc()  # there may be another cause
        todo = "rename it, or start in another folder"
        if sys.argv[1:2] == ["doctor"]:
            print(f"{'fail':<8}{'Python':<20}{found}\n{'':<28}do: {todo}")  # noqa: T201
        else:
            print(f"error: {found}: {todo}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main()
