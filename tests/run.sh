#!/usr/bin/env bash
# Everything that has to hold: style, types, tests. Makes the same .venv as quickstart.sh, with the test tools.
#
#   bash tests/run.sh            all of it
#   bash tests/run.sh --fast     without what takes more than a few seconds
#   bash tests/run.sh --full     with the long fault campaigns
#   bash tests/run.sh -- ARGS    pytest alone, with these arguments
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/setup_env.sh
. "$here/launch/setup_env.sh"
setup_env dev
cd "$here"

select=(-m "not campaign")
case "${1:-}" in
  --fast) select=(-m "not campaign and not slow") ;;
  --full) select=() ;;
  --)
    shift
    exec .venv/bin/python -m pytest "$@"
    ;;
  "") ;;
  *)
    echo "unknown option $1: expected --fast, --full or -- PYTEST_ARGUMENTS" >&2
    exit 2
    ;;
esac
if ! [[ "${select[1]:-}" == *"not slow"* ]]; then
  PYTHON=.venv/bin/python slurm/local-cluster install # as root, where apt-get is; otherwise its tests are skipped
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Hundreds of processes import this; each would compile it, where the environment says to write no bytecode.
.venv/bin/python -m compileall -q distdl tests examples
# What counts seconds has the machine to itself; the rest runs on every core, the longest first.
alone=(tests/timed tests/gpu)
failed=0
.venv/bin/python -m pytest -q --durations=10 -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
  "${select[@]}" tests/faults tests/slurm tests/multiprocess tests/cli tests/unit || failed=$?
.venv/bin/python -m pytest -q --durations=10 "${select[@]}" "${alone[@]}" || failed=$?
exit "$failed"
