"""BLEU and chrF by sacrebleu. The one file importing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distdl.errors import EnvironmentProblem


def check_sacrebleu() -> None:
    """Raises EnvironmentProblem where it is not installed."""
    _library()


def bleu_and_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Of the whole corpus, 0 to 100, by sacrebleu's defaults: BLEU with tokenizer 13a (Papineni et al., 2002;
    Post, 2018, arXiv:1804.08771), and chrF2 (Popović, 2015).
    """
    library = _library()
    bleu, chrf = library.corpus_bleu(hypotheses, [references]), library.corpus_chrf(hypotheses, [references])
    return {"bleu": float(bleu.score), "chrf": float(chrf.score)}


def _library() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise EnvironmentProblem(
            "task translation measures BLEU with sacrebleu: pip install sacrebleu, or set task.beam=0, which "
            "measures the loss alone"
        ) from error
    return sacrebleu
