"""Scores of texts against values worked out by hand."""

import math

import pytest

pytest.importorskip("sacrebleu")
rouge = pytest.importorskip("rouge_score")

from electrax.tasks.texts import figures, signatures  # noqa: E402


def test_bleu_is_the_geometric_mean_of_the_precisions_times_the_brevity_penalty():
    # of 5 words 4 are right, of 4 pairs 3, of 3 triples 2, of 2 fours 1; as long as the reference
    found = figures("bleu", ["the cat sat on it"], [("the cat sat on mats",)])
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert found["bleu"] == pytest.approx(expected, rel=1e-6)
    short = figures("bleu", ["the cat sat on"], [("the cat sat on mats",)])
    assert short["bleu"] == pytest.approx(100 * math.exp(1 - 5 / 4), rel=1e-6)


def test_texts_may_have_different_numbers_of_references():
    found = figures("bleu", ["a b c d", "e f g h"], [("a b c d", "x"), ("e f g h",)])
    assert found["bleu"] == pytest.approx(100.0)


def test_rouge_is_the_mean_f_measure_of_the_best_reference():
    # of two words one is in the first reference of two words: precision and recall 1/2; the second has both
    one = figures("rougeL", ["red house"], [("red car",)])
    assert one["rouge1"] == pytest.approx(50.0) and one["rouge2"] == 0.0 and one["rougeL"] == pytest.approx(50.0)
    best = figures("rouge1", ["red house"], [("red car", "a red house")])
    assert best["rouge1"] == pytest.approx(100 * 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))


def test_the_signature_says_how_bleu_was_computed():
    found = {row["metric"]: row["signature"] for row in signatures("bleu", 2)}
    assert "nrefs:2" in found["bleu"] and "tok:13a" in found["bleu"] and "nc:6" in found["chrf"]
    assert "stemmed" in signatures("rouge1", 1)[0]["signature"]
