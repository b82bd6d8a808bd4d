"""Make the sentiment sentences that lie inside the package from the file of ratings they come from.

    pip download --no-deps --no-binary :all: vaderSentiment==2.5
    # unpack it, and in it additional_resources/hutto_ICWSM_2014.tar.gz
    python benchmarks/sentiment.py --ratings movieReviewSnippets_GroundTruth.txt \
        --out distdl/data/embedded/sentiment

Writes OUT/text/{train,test}.parquet, and in OUT the same prepared: words in lower case, those of the training
sentences that occur twice or more. Same input, same bytes. Other tokens:
distdl data prepare sentiment --tokenize text --tokenizer bpe --out DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from distdl.data.huggingface import class_label, feature_of, with_features
from distdl.data.index import INDEX_FILE
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.data.prepare.tokenize import train_tokenizer
from distdl.errors import DataError

CLASSES = ("negative", "positive")
SPLIT_SEED = 20140601
TEST_SHARE = 0.1


def read_ratings(file: Path) -> list[tuple[str, int]]:
    """(sentence, class) of each line `id <tab> mean rating <tab> sentence`; a mean of 0 is left out."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        parts = line.split("\t")
        if len(parts) != 3:
            raise DataError(f"{file}, line {number}: {len(parts)} fields; expected id, rating, sentence")
        if rating := float(parts[1]):
            found.append((parts[2], int(rating > 0)))
    return found


def is_test(sentence: str) -> bool:
    """Whether a sentence is tested on: by its words alone, so that repeated ones stay on one side."""
    return xxhash.xxh3_64_intdigest(sentence.lower().encode(), SPLIT_SEED) < TEST_SHARE * 2**64


def table(rows: list[tuple[str, int]]) -> pa.Table:
    """An Arrow table with Hugging Face features: text, and label (two named classes)."""
    texts, labels = zip(*rows, strict=True)
    made = pa.table({"text": pa.array(texts, pa.string()), "label": pa.array(labels, pa.int64())})
    features = {"text": feature_of(pa.string()), "label": class_label(CLASSES)}
    return made.cast(with_features(made.schema, features))


def lower_case_words(texts: list[str]) -> str:
    """A tokenizer of the words of `texts`, as JSON; case is ignored."""
    tokenizer = json.loads(train_tokenizer("word", [text.lower() for text in texts], 2**20, min_count=2))
    tokenizer["normalizer"] = {"type": "Lowercase"}
    return json.dumps(tokenizer, ensure_ascii=False) + "\n"


def make(ratings: Path, out: Path) -> None:
    """Everything but the licence, which is kept."""
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for row in read_ratings(ratings):
        splits["test" if is_test(row[0]) else "train"].append(row)
    (out / "text").mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        pq.write_table(
            table(rows), out / "text" / f"{name}.parquet", compression="zstd", compression_level=19
        )
        print(f"{name}: {len(rows)} rows, {sum(label for _, label in rows)} positive")
    with tempfile.TemporaryDirectory() as temporary:
        words = Path(temporary) / "tokenizer.json"
        words.write_text(lower_case_words([text for text, _ in splits["train"]]), encoding="utf-8")
        options = Options(tokenize=("text",), tokenizer=str(words), name="sentiment")
        made = Path(temporary) / "sentiment"
        index = prepare(str(out / "text"), made, options)
        # Where it was made says nothing to those who read it elsewhere.
        origin = {"source": "benchmarks/sentiment.py", "versions": index.prepared["versions"]}
        index = index.model_copy(update={"prepared": origin})
        (made / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")
        shutil.copytree(made, out, dirs_exist_ok=True)
    print(f"{out}: {index.vocabulary['text']} tokens")


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ratings", type=Path, required=True, metavar="FILE", help="id, mean rating, text")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the dataset goes")
    given = parser.parse_args(arguments)
    try:
        make(given.ratings, given.out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
