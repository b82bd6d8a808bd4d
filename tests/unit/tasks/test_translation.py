"""Translation: what is counted, what is found, and what BLEU is told."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distdl.data.description import describe_data
from distdl.data.feed import Feed
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.data.table.ragged import Ragged
from distdl.errors import DataError, RecipeError
from distdl.models import model_factory
from distdl.models.beam import State, beam_search
from distdl.models.seq2seq_lstm import Seq2SeqLstm
from distdl.recipe.schema import Data
from distdl.samples import DataInfo, Field
from distdl.tasks import build_task

WORDS = ["ab", "cd", "ef", "gh", "ij"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of sentences: the second is the first backwards."""
    source = tmp_path_factory.mktemp("pairs")
    long = itertools.islice(itertools.product(WORDS, repeat=5), 0, None, 31)
    sentences = [*itertools.product(WORDS, repeat=2), *long]
    for split in ("train", "test"):
        (source / f"{split}.en").write_text("".join(" ".join(s) + "\n" for s in sentences))
        (source / f"{split}.de").write_text("".join(" ".join(s[::-1]) + "\n" for s in sentences))
    options = Options(tokenize=("en", "de"), tokenizer="word", min_count=1)
    prepare(str(source), source / "data", options)
    return source / "data"


def task_of(folder: Path, model: dict[str, Any] | None = None, **keys: Any) -> Any:
    factory = model_factory("seq2seq_lstm", model or {"embedding": 16, "hidden": 24, "dropout": 0.0})
    info = describe_data(Data(path=str(folder)))
    return build_task("translation", {"source": "en", "target": "de", **keys}, factory, info)


def rows_of(folder: Path, n: int) -> Any:
    return Feed.open(Data(path=str(folder))).rows("test").gather(np.arange(n))


def ragged(*rows: list[int]) -> Ragged:
    values = np.array([token for row in rows for token in row], np.int32)
    return Ragged(values, np.array([len(row) for row in rows], np.int64))


def test_targets_end_and_inputs_begin(folder: Path) -> None:
    mine = task_of(folder)  # 4 special tokens and 5 words; <bos> and <eos> of the task are 9 and 10
    batch = mine.collate({"en": ragged([5, 6], []), "de": ragged([7], [4, 8, 6])})
    assert batch["source"].tolist() == [[5, 6], [0, 0]]
    assert batch["lengths"].tolist() == [2, 0]
    assert batch["inputs"].tolist() == [[9, 7, 0, 0], [9, 4, 8, 6]]
    assert batch["targets"].tolist() == [[7, 10, -100, -100], [4, 8, 6, 10]]
    assert mine.count(batch) == 6
    model = mine.build_model()
    parts = [mine.collate({"en": ragged(s), "de": ragged(t)}) for s, t in (([5, 6], [7]), ([], [4, 8, 6]))]
    torch.testing.assert_close(mine.loss_sum(model, batch), sum(mine.loss_sum(model, p) for p in parts))


def test_it_learns_to_turn_sentences_round_and_measures_text(folder: Path) -> None:
    torch.manual_seed(0)
    mine = task_of(folder, max_tokens=5, beam=2)
    model = mine.build_model()
    batch = mine.collate(rows_of(folder, 120))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (mine.loss_sum(model, batch) / mine.count(batch)).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = [mine.measure(model, mine.collate(rows_of(folder, n))) for n in (5, 120)]
    assert found[1]["references"][:3] == ["ab ab", "cd ab", "ef ab"]
    metrics = mine.metrics(found)
    assert set(metrics) == {"loss", "perplexity", "bleu", "chrf"}
    assert metrics["bleu"] > 80
    assert metrics["chrf"] > 80
    turned = [{**f, "hypotheses": f["references"]} for f in found]
    assert mine.metrics(turned)["bleu"] == pytest.approx(100)
    assert set(task_of(folder, beam=0).metrics([{"loss": 2.0, "count": 4}])) == {"loss", "perplexity"}


def test_what_both_do_not_know_is_no_match(folder: Path) -> None:
    mine = task_of(folder)  # 1 stands for every word that the tokenizer does not know

    class Says(torch.nn.Module):
        def forward(self, source: Tensor, lengths: Tensor, *target: Tensor, **search: Any) -> Tensor:
            return torch.zeros(1, target[0].shape[1], 11) if target else torch.tensor([[1, 4, 1, 10]])

    batch = mine.collate({"en": ragged([1, 5]), "de": ragged([1, 4, 1])})
    found = mine.measure(Says(), batch)
    assert (found["hypotheses"], found["references"]) == (["ij"], ["<unk> ij <unk>"])
    assert mine.predict(Says(), batch) == [{"text": "<unk> ij <unk>"}]


def test_tokens_of_ones_own_and_one_that_the_vocabulary_does_not_have(folder: Path) -> None:
    known = describe_data(Data(path=str(folder)))
    fields = {name: replace(field, vocabulary=None) for name, field in known.fields.items()}
    factory = model_factory("seq2seq_lstm", {"embedding": 4, "hidden": 4})
    keys: dict[str, Any] = {"source": "en", "target": "de", "beam": 0}
    with pytest.raises(DataError, match=r"'en'.*give task\.source_vocabulary"):
        build_task("translation", keys, factory, replace(known, fields=fields))
    keys |= {"source_vocabulary": 7, "target_vocabulary": 9}
    mine: Any = build_task("translation", keys, factory, replace(known, fields=fields))
    with pytest.raises(
        DataError, match=r"'en' has tokens from 2 to 7, .* raise task\.source_vocabulary to 8"
    ):
        mine.collate({"en": ragged([2, 7]), "de": ragged([8])})
    with pytest.raises(
        DataError, match=r"'de' has tokens from 9 to 9, .* raise task\.target_vocabulary to 10"
    ):
        mine.collate({"en": ragged([6]), "de": ragged([9])})


def chain(tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Greedily 1, then 2 or 3 alike; the better sequence begins with the worse token 0 and ends at once."""
    after = torch.log(
        torch.tensor(
            [
                [0.0, 0.0, 0.0, 0.0, 1.0],
                [0.0, 0.0, 0.5, 0.5, 0.0],
                [0.0, 0.0, 0.0, 0.0, 1.0],
                [0.0, 0.0, 0.0, 0.0, 1.0],
                [0.4, 0.6, 0.0, 0.0, 0.0],
            ]
        )
    )
    return after[tokens], {"seen": torch.cat([state["seen"], tokens[:, None]], 1)}


@pytest.mark.parametrize(("beam", "found"), [(1, [1, 2, 4, 4]), (2, [0, 4, 4, 4]), (4, [0, 4, 4, 4])])
def test_a_wider_beam_finds_what_greed_misses(beam: int, found: list[int]) -> None:
    state = {"seen": torch.zeros(3 * beam, 0, dtype=torch.long)}
    best = beam_search(chain, state, 3, beam=beam, steps=4, bos=4, eos=4, length_penalty=0.0)
    assert best.tolist() == [found] * 3


def test_padding_and_neighbours_change_nothing() -> None:
    torch.manual_seed(0)
    model = Seq2SeqLstm(9, 9, 8, 6, 2, tied=True).eval()
    assert "head.weight" not in dict(model.named_parameters())
    source, target = torch.randint(0, 9, (2, 5)), torch.randint(0, 9, (2, 4))
    lengths = torch.tensor([3, 5])
    together = model(source, lengths, target)
    torch.testing.assert_close(together[:1], model(source[:1, :3], lengths[:1], target[:1]))
    search = {"beam": 3, "steps": 6, "bos": 7, "eos": 8, "length_penalty": 1.0}
    with torch.no_grad():
        assert torch.equal(model(source, lengths, **search)[:1], model(source[:1, :3], lengths[:1], **search))
    with pytest.raises(RecipeError, match="source has 9 tokens, the target 8"):
        Seq2SeqLstm(9, 8, tied=True)


def test_data_that_do_not_suit() -> None:
    fields = {name: Field("int32", (None,), None, 9) for name in ("en", "de")}
    info = DataInfo("pairs", {"train": 1}, fields, "f")
    factory = model_factory("seq2seq_lstm", {})
    with pytest.raises(DataError, match="'dee' is no column of token ids; did you mean 'de'"):
        build_task("translation", {"source": "en", "target": "dee"}, factory, info)
    with pytest.raises(DataError, match="has no tokenizer to make text of tokens with"):
        build_task("translation", {"source": "en", "target": "de"}, factory, info)
    build_task("translation", {"source": "en", "target": "de", "beam": 0}, factory, info)


@torch.no_grad()
def test_predictions_are_what_bleu_is_told(folder: Path) -> None:
    mine = task_of(folder, beam=2, max_tokens=6)
    model = mine.build_model().eval()
    batch = mine.collate(rows_of(folder, 4))
    found = mine.predict(model, batch)
    assert [one["text"] for one in found] == mine.measure(model, batch)["hypotheses"]
    with pytest.raises(RecipeError, match="beam"):
        task_of(folder, beam=0).predict(model, batch)
