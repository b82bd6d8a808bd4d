# Sourced by quickstart.sh and tests/run.sh: makes .venv with distdl in it. Does nothing where that is done.
#   setup_env EXTRAS        EXTRAS such as "" or "dev"

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python3.14; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "distdl needs Python 3.10 or newer and found none (looked for python3, python3.10 ... python3.14)." >&2
  echo "Install one, or name it:  PYTHON=/path/to/python3 bash $0" >&2
  return 3
}

setup_env() {
  local extras="$1" root venv python wanted stamp log
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  venv="$root/.venv"
  python="$(find_python)" || return 3
  stamp="$venv/.distdl-${extras:-base}"
  wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
  if [ -x "$venv/bin/distdl" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return 0
  fi
  if ! [ -x "$venv/bin/pip" ]; then
    rm -rf "$venv"
    if ! "$python" -m venv "$venv"; then
      echo "Could not make a virtual environment with $python. On Debian or Ubuntu: apt install python3-venv" >&2
      return 3
    fi
  fi
  log="$venv/pip.log"
  echo "Installing distdl${extras:+ with its $extras tools} into .venv (a few minutes the first time) ..."
  if ! (cd "$root" && "$venv/bin/pip" install --disable-pip-version-check -c constraints.txt \
        -e ".${extras:+[$extras]}") >"$log" 2>&1; then
    echo "pip could not install distdl. The end of $log:" >&2
    tail -n 15 "$log" >&2
    echo "If a package cannot be downloaded, check the network and any proxy or index in 'pip config list';" >&2
    echo "if the disk is full, free some; then run the same command again: it goes on from here." >&2
    return 3
  fi
  echo "$wanted" >"$stamp"
}
