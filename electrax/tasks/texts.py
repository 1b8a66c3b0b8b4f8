"""BLEU and chrF by sacrebleu and ROUGE by rouge-score, imported only when used."""

from collections.abc import Sequence
from typing import Any

from electrax.config import UserError

METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL")


def figures(metric: str, outputs: Sequence[str], references: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """The family of `metric`: BLEU and chrF of the corpus, from 0 to 100, as sacrebleu gives them, or the mean over the
    texts of the F-measures ROUGE-1, 2 and L with stemming, from 0 to 100, of several references the best."""
    if metric.startswith("rouge"):
        scorer = _rouge()
        each = [scorer.score_multi(true, out) for out, true in zip(outputs, references, strict=True)]
        return {name: 100.0 * sum(s[name].fmeasure for s in each) / max(len(each), 1) for name in METRICS[2:]}
    # sacrebleu wants one stream a reference; a text with fewer has none in the later ones
    streams = [[true[i] if i < len(true) else None for true in references] for i in range(max(map(len, references)))]
    return {name: scorer.corpus_score(list(outputs), streams).score for name, scorer in _sacrebleu().items()}


def signatures(metric: str, references: int) -> list[dict[str, Any]]:
    """How each metric of the family is computed, in the words of its library."""
    if metric.startswith("rouge"):
        import importlib.metadata

        version = importlib.metadata.version("rouge-score")
        return [{"metric": "rouge", "signature": f"rouge-score {version}, stemmed, F-measure, best of references"}]
    found = []
    for name, scorer in _sacrebleu().items():
        scorer.corpus_score(["a"], [["a"]] * references)  # a signature counts the references of the last score
        found.append({"metric": name, "signature": str(scorer.get_signature())})
    return found


def _sacrebleu() -> dict[str, Any]:
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UserError("BLEU and chrF need another library: pip install sacrebleu") from None
    return {"bleu": BLEU(), "chrf": CHRF()}


def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("ROUGE needs another library: pip install rouge-score") from None
    return RougeScorer(list(METRICS[2:]), use_stemmer=True)
