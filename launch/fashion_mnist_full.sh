#!/usr/bin/env bash
# Make data/fashion_mnist_full: all 60,000 + 10,000 images of Fashion-MNIST, prepared (55 MB), for
# configs/fashion_cnn_full.yaml. Run it once, from anywhere; a second run finds the files and stops.
#
#   bash launch/fashion_mnist_full.sh            fetch Debian's package dataset-fashion-mnist (31 MB)
#   bash launch/fashion_mnist_full.sh FOLDER     use the four IDX files (.gz or not) in FOLDER instead
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out="$root/data/fashion_mnist_full"
python="$root/.venv/bin/python"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-3}"
}

manual() {
    fail "$1
Get the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
t10k-labels-idx1-ubyte (with or without .gz) from https://github.com/zalandoresearch/fashion-mnist, put them
into one folder, and run: bash launch/fashion_mnist_full.sh FOLDER"
}

[ $# -le 1 ] || fail "expected at most one argument, a folder with the four IDX files; got $#" 2
if [ -f "$out/index.json" ] || [ -f "$out/train.parquet" ]; then
    echo "$out is there already; delete it to make it anew"
    exit 0
fi
[ -x "$python" ] || fail "there is no $python; run 'bash launch/quickstart.sh' first, which makes it"

if [ $# -eq 1 ]; then
    [ -d "$1" ] || fail "$1 is not a folder; expected a folder with the four IDX files" 2
    idx=$1
else
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        manual "this machine has no apt-get and dpkg-deb, so Debian's package cannot be fetched."
    scratch=$(mktemp -d)
    trap 'rm -rf -- "$scratch"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    echo "fetching Debian's package dataset-fashion-mnist ..."
    (cd "$scratch" && apt-get -q -o APT::Sandbox::User=root download dataset-fashion-mnist) ||
        manual "apt-get could not fetch dataset-fashion-mnist; if its lists are old, 'sudo apt-get update' helps."
    dpkg-deb -x "$scratch"/dataset-fashion-mnist_*.deb "$scratch/unpacked"
    idx="$scratch/unpacked/usr/share/datasets/fashion-mnist"
fi

PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" -m distdl data prepare fashion_mnist --from "$idx" --out "$out"
