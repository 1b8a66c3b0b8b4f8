"""Scores of answers by the published arithmetic of the SQuAD scripts, by hand."""

import math

import numpy as np
import pytest

from electrax.tasks.answers import (
    apply_threshold,
    best_threshold,
    exact_match,
    normalize_answer,
    question_figures,
    question_scores,
    threshold_figures,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, and a DOG!", "cat and dog"),
        ("the", ""),
        ("A an THE", ""),
        ("theatre", "theatre"),  # articles are whole words
        ("a.m.", "am"),  # punctuation goes first, so no article is left
        ("U.S.-led", "usled"),
        ("1990–91", "1990–91"),  # the dash is not ASCII
        ("“Sky” ’s", "“sky” ’s"),
        ("tab\tand\u00a0space\n", "tab and space"),
        ("Élan", "élan"),
        ("", ""),
    ],
)
def test_an_answer_is_normalised(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match_is_of_the_normalised_texts():
    assert exact_match("The Cat.", "cat") == 1
    assert exact_match("cats", "cat") == 0
    assert exact_match("the", "") == 1


@pytest.mark.parametrize(
    ("predicted", "gold", "f1"),
    [
        ("the big cat", "a cat", 2 / 3),  # precision 1/2, recall 1: 2 * 1/2 / (3/2)
        ("big cat", "cat big", 1),  # order does not count
        ("no no no", "no no", 4 / 5),  # 2 shared: precision 2/3, recall 1: (4/3) / (5/3)
        ("no yes", "no no no", 2 / 5),  # 1 shared: precision 1/2, recall 1/3: (1/3) / (5/6)
        ("dog", "cat", 0),
        ("the", "cat", 0),
        ("the", "a", 0),  # nothing is shared where nothing is left
    ],
)
def test_f1_counts_the_words_shared(predicted, gold, f1):
    assert token_f1(predicted, gold) == pytest.approx(f1)


def test_each_figure_takes_the_best_gold_answer():
    golds = {"q": ["sat on the mat", "mat", "black cat"]}
    exact, f1 = question_scores({"q": "the black mat"}, golds)
    # with "mat": precision 1/2, recall 1, F1 2/3; with "sat on mat" 2/5; with "black cat" 1/2
    assert exact == {"q": 0} and f1 == {"q": pytest.approx(2 / 3)}


def test_figures_are_percentages_of_all_questions():
    golds = {"a": ["cat"], "b": ["big dog", "dog"], "c": ["mouse"], "d": ["x y"]}
    predictions = {"a": "the cat", "b": "big", "c": "", "d": "x y z", "other": "unasked"}
    # F1: 1, 2/3, 0, and precision 2/3, recall 1: 4/5
    assert question_figures(predictions, golds) == pytest.approx(
        {"exact": 100 / 4, "f1": 100 * (1 + 2 / 3 + 0 + 4 / 5) / 4, "total": 4, "missing": 0}
    )


def test_a_missing_prediction_counts_zero():
    golds = {"a": ["cat"], "b": ["dog"], "c": []}
    figures = question_figures({"a": "cat"}, golds)
    assert figures == pytest.approx(
        {
            "exact": 100 / 3,
            "f1": 100 / 3,
            "total": 3,
            "missing": 2,
            "HasAns_exact": 50,
            "HasAns_f1": 50,
            "HasAns_total": 2,
            "NoAns_exact": 0,
            "NoAns_f1": 0,
            "NoAns_total": 1,
        }
    )


def test_questions_without_an_answer_want_an_empty_text():
    golds = {"a": ["black cat"], "b": [], "c": [], "d": []}
    figures = question_figures({"a": "cat", "b": "", "c": "dog", "d": "the"}, golds)
    # "the" normalises to the empty text; F1 of a: precision 1, recall 1/2: 2/3
    assert figures["NoAns_exact"] == figures["NoAns_f1"] == pytest.approx(200 / 3)
    assert (figures["HasAns_exact"], figures["HasAns_f1"]) == (0, pytest.approx(200 / 3))
    assert (figures["exact"], figures["f1"]) == (50, pytest.approx(100 * (2 + 2 / 3) / 4))
    assert (figures["total"], figures["HasAns_total"], figures["NoAns_total"]) == (4, 1, 3)


def test_a_set_of_unanswerable_questions_alone_has_no_others_figures():
    assert set(question_figures({"a": ""}, {"a": []})) == {
        *("exact", "f1", "total", "missing"),
        *("NoAns_exact", "NoAns_f1", "NoAns_total"),
    }


def test_a_gold_answer_that_normalises_to_nothing_is_kept_in_1_1_and_dropped_in_2_0():
    golds, predictions = {"a": ["cat", "."], "b": ["."]}, {"a": "", "b": "", "c": ""}
    assert question_scores(predictions, golds) == ({"a": 1, "b": 1}, {"a": 0, "b": 0})
    # once "." is gone, a has one gold answer and b has none
    assert question_scores(predictions, golds | {"c": []}) == ({"a": 0, "b": 1, "c": 1}, {"a": 0, "b": 1, "c": 1})


def test_no_question_has_no_figure():
    figures = question_figures({}, {})
    assert math.isnan(figures["exact"]) and math.isnan(figures["f1"]) and figures["total"] == 0
    assert math.isnan(threshold_figures({}, {}, {})["best_f1"])


# -- the threshold ----------------------------------------------------------------------------------------------------


def test_a_score_above_the_threshold_blanks_the_answer():
    assert apply_threshold({"a": "x", "b": "y", "c": ""}, {"a": 1.0, "b": 1.5, "c": -3.0}, 1.0) == {
        "a": "x",
        "b": "",
        "c": "",
    }


GOLDS = {"a": ["cat"], "b": ["black dog"], "c": [], "d": [], "e": ["mouse"]}
TEXTS = {"a": "cat", "b": "dog", "c": "bird", "d": "fish", "e": "mouse"}


def test_the_best_threshold_by_hand():
    scores = {"a": -5.0, "c": -4.0, "b": -3.0, "e": -2.0, "d": 1.0}
    # from no answer anywhere 2 (c and d are right); exact: a 3, c 2, b 2, e 3, d 2. The first 3 is at a
    # F1: a 3, c 2, b 2 2/3, e 3 2/3, d 2 2/3. The best is at e
    assert threshold_figures(TEXTS, GOLDS, scores) == pytest.approx(
        {"best_exact": 60, "best_exact_thresh": -5, "best_f1": 100 * (3 + 2 / 3) / 5, "best_f1_thresh": -2}
    )


def test_where_no_answer_at_all_is_best_the_threshold_is_zero():
    scores = {"c": -3.0, "d": -2.0, "a": 1.0, "b": 2.0, "e": 3.0}
    # 2; c 1, d 0, a 1, b 1, e 2: never above the start
    assert threshold_figures(TEXTS, GOLDS, scores)["best_exact"] == 40
    assert threshold_figures(TEXTS, GOLDS, scores)["best_exact_thresh"] == 0


def test_equal_scores_are_let_in_one_by_one_in_their_order():
    ones = dict.fromkeys(GOLDS, 1.0)
    # a, b, c, d, e: 3, 3, 2, 1, 2 although a threshold of 1 lets all five in, for 2
    assert threshold_figures(TEXTS, GOLDS, ones)["best_exact"] == 60
    assert question_figures(apply_threshold(TEXTS, ones, 1.0), GOLDS)["exact"] == 40


def test_an_empty_prediction_stays_right_for_a_question_without_an_answer():
    assert best_threshold({"a": "", "b": "x"}, {"a": [], "b": ["x"]}, {"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 1.0}) == (
        100,
        1.0,
    )


def test_questions_without_a_prediction_lower_the_best():
    figures = threshold_figures({"a": "cat"}, {"a": ["cat"], "b": ["dog"], "c": []}, {"a": 0.5, "b": 0.1, "c": 0.2})
    assert figures["best_exact"] == pytest.approx(100 / 3) and figures["best_exact_thresh"] == 0.5


@pytest.mark.parametrize("seed", range(8))
def test_no_threshold_is_better_than_the_best(seed):
    random = np.random.RandomState(seed)
    words = ["red", "blue", "red blue", "green red"]
    names = [f"q{i}" for i in range(15)]
    golds = {name: [] if random.rand() < 0.5 else [random.choice(words)] for name in names}
    texts = {name: str(random.choice(words)) for name in names}
    scores = {name: float(score) for name, score in zip(names, random.standard_normal(15), strict=True)}
    best = threshold_figures(texts, golds, scores)
    for figure in ("exact", "f1"):
        by_threshold = {t: question_figures(apply_threshold(texts, scores, t), golds)[figure] for t in scores.values()}
        nothing = question_figures(dict.fromkeys(names, ""), golds)[figure]
        assert best[f"best_{figure}"] == pytest.approx(max(nothing, *by_threshold.values()))
        if best[f"best_{figure}"] > nothing:
            assert by_threshold[best[f"best_{figure}_thresh"]] == pytest.approx(best[f"best_{figure}"])
