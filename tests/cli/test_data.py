"""`distdl data ...` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distdl import errors
from tests.commands import distdl

# A process for each case.
pytestmark = pytest.mark.slow


def test_prepare_look_check_and_copy(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.csv").write_text("text,label\n" + "good day,pos\nbad day,neg\n" * 10)
    out = str(tmp_path / "out")
    options = ["--classes", "label", "--tokenize", "text", "--tokenizer", "word", "--shards", "2"]
    more = ["--holdout", "validation=0.25", "--rename", "text=words", "--workers", "1"]
    options[options.index("text")] = "words"
    code, output = distdl("data", "prepare", str(tmp_path / "in"), "--out", out, *options, *more)
    assert code == 0, output
    assert "20 of 20 rows" in output
    assert "split train: 15 rows, 2 shards" in output

    code, output = distdl("data", "info", out, "--json")
    assert json.loads(output)["splits"]["validation"]["rows"] == 5
    code, output = distdl("data", "head", out, "-n", "1", "--split", "validation")
    assert (code, output.splitlines()[0]) == (0, "row 0")
    assert "day'" in output
    assert distdl("data", "stage", out, "--to", str(tmp_path / "local"))[0] == 0
    assert distdl("data", "verify", str(tmp_path / "local"))[0] == 0

    shard = tmp_path / "out" / "train" / "data-00000-of-00002.arrow"
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    code, output = distdl("data", "verify", out)
    assert code == errors.DATA
    assert f"{shard}: its bytes are not those that were written" in output

    code, output = distdl("data", "prepare", str(tmp_path / "in"), "--out", out)
    assert code == errors.DATA
    assert "--overwrite" in output


def test_usage_errors(tmp_path: Path) -> None:
    for options in (["--image-size", "big"], ["--rename", "x"], ["--holdout", "v=some"], ["--shards", "0"]):
        code, output = distdl("data", "prepare", str(tmp_path), "--out", str(tmp_path / "o"), *options)
        assert code == errors.USAGE, output
        assert "Traceback" not in output
    code, output = distdl("data", "info", str(tmp_path))
    assert code == errors.DATA
    assert "index.json" in output


def test_a_name_that_is_not_prepared_gives_the_command(tmp_path: Path) -> None:
    from tests.faults.support import write_recipe

    recipe = write_recipe(tmp_path)
    code, output = distdl("plan", str(recipe), "data.name=cifar10", cwd=tmp_path)
    assert code == errors.DATA, output
    assert "distdl data prepare cifar10 --out data/cifar10" in output
