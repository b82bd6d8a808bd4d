"""Text -> token ids with Hugging Face `tokenizers`, trained here or brought along. The one file importing it.

A trained tokenizer has <pad> 0, <unk> 1, <bos> 2, <eos> 3 and depends on the text alone: word counts are
taken here and ties broken by the word, so that the same text gives the same ids on every machine.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distdl.data.stream.hub import cache_only, refusal
from distdl.errors import DataError, EnvironmentProblem

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
TRAINED = ("bpe", "word", "space")
"""bpe: byte-level pairs; word: words and runs of punctuation; space: whatever stands between spaces."""


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int, min_count: int) -> str:
    """The JSON of a tokenizer of `kind` (see TRAINED) for `texts`, with at most `vocab_size` tokens.

    Words seen fewer than `min_count` times do not enter. Raises DataError where nothing is left.
    """
    library = _library()
    if kind == "bpe":
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_count,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return str(tokenizer.to_str())
    splitter = (
        library.pre_tokenizers.WhitespaceSplit() if kind == "space" else library.pre_tokenizers.Whitespace()
    )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    words = sorted(
        (w for w in counts if counts[w] >= min_count and w not in SPECIAL), key=lambda w: (-counts[w], w)
    )
    if not words:
        raise DataError(f"no word occurs {min_count} times or more; lower --min-count")
    kept = [*SPECIAL, *words][:vocab_size]
    model = library.models.WordLevel({word: i for i, word in enumerate(kept)}, unk_token="<unk>")
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens(list(SPECIAL))
    # The vocabulary is a hash map, and its JSON is written in an order of its own: sort it.
    return json.dumps(json.loads(tokenizer.to_str()), indent=1, ensure_ascii=False, sort_keys=False)


def tokenizer_file(name: str) -> Path | None:
    """The local file that the tokenizer `name` is: a tokenizer.json, or that of a folder; else None."""
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    return path if name not in (*TRAINED, "none") and path.is_file() else None


def load_tokenizer(name: str) -> str:
    """The JSON of an existing tokenizer: a tokenizer.json, a folder that has one, or a hub id.

    Raises DataError for a file that is not one, and for a hub that cannot be reached.
    """
    path = tokenizer_file(name)
    library = _library()
    try:
        if path is not None:
            text = path.read_text(encoding="utf-8")
            library.Tokenizer.from_str(text)
            return text
        if name.count("/") > 1 or name.endswith(".json"):
            raise DataError(
                f"the tokenizer {name} does not exist; expected {', '.join(TRAINED)}, a file or a hub id"
            )
        return _from_hub(library, name)
    except DataError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for everything
        raise DataError(
            f"cannot load the tokenizer {name!r}: {error}. Expected {', '.join(TRAINED)}, a tokenizer.json, "
            "or the id of a model on the hub; without a network, copy its tokenizer.json here and name that."
        ) from error


def _from_hub(library: Any, name: str) -> str:
    import huggingface_hub.constants

    problem = refusal()
    try:
        with cache_only(huggingface_hub.constants) if problem else nullcontext():
            return str(library.Tokenizer.from_pretrained(name).to_str())
    except Exception as error:  # tokenizers raises bare Exception for everything
        if not problem:
            raise
        raise DataError(
            f"cannot load the tokenizer {name!r}: it is no local file, the hub does not answer ({problem}) "
            "and the cache does not have it. Copy its tokenizer.json here and name that file."
        ) from error


@functools.lru_cache(maxsize=2)
def _parsed(text: str) -> Any:
    tokenizer = _library().Tokenizer.from_str(text)
    tokenizer.no_padding()  # rows keep their own length, whatever the file says
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: str, texts: Sequence[str], max_tokens: int | None) -> tuple[pa.Array, int]:
    """(list<int32> [n], rows cut): the tokens of each text, the first `max_tokens` of them."""
    rows = [e.ids for e in _parsed(tokenizer).encode_batch(list(texts))]
    cut = 0 if max_tokens is None else sum(len(row) > max_tokens for row in rows)
    if cut:
        rows = [row[:max_tokens] for row in rows]
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    values = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(ends[-1]))
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(values)), cut


def decode(tokenizer: str, tokens: Sequence[int]) -> str:
    """The text of `tokens`, for a person."""
    return str(_parsed(tokenizer).decode(list(tokens), skip_special_tokens=False))


@functools.lru_cache(maxsize=2)
def unknown(tokenizer: str) -> int | None:
    """The id that stands for every word that the tokenizer does not know; None where it has none."""
    model = json.loads(tokenizer)["model"]
    if model.get("unk_token") is None:
        found: int | None = model.get("unk_id")
        return found
    token: int | None = _parsed(tokenizer).token_to_id(model["unk_token"])
    return token


def vocabulary_size(tokenizer: str) -> int:
    """The largest token id plus one: a tokenizer from elsewhere may leave ids out."""
    return 1 + max(_parsed(tokenizer).get_vocab().values(), default=-1)


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise EnvironmentProblem("tokenising needs the library tokenizers: pip install tokenizers") from error
    return tokenizers
