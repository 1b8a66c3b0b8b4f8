"""Figures against scikit-learn and scipy, at random and where a figure is undefined; a few by hand."""

import math
import warnings

import numpy as np
import pytest

from electrax.tasks.metrics import (
    accuracy,
    area_under_curve,
    binary_f1,
    classification_figures,
    confusion,
    macro_f1,
    matthews,
    multilabel_figures,
    pearson,
    per_class,
    regression_figures,
    spearman,
)

EMPTY = np.zeros(0, np.int32)


def pairs(classes):
    """(predicted, true): at random, all right, all wrong, one class predicted, one class true, one class only."""
    random = np.random.RandomState(classes)
    true, other = random.randint(0, classes, (2, 50))
    ones, zeros = np.ones(50, int), np.zeros(50, int)
    mostly = np.where(random.rand(50) < 0.7, true, other)
    found = [(other, true), (mostly, true), (true, true), ((true + 1) % classes, true)]
    return [*found, (ones, true), (true, ones), (ones, ones), (zeros, zeros), (ones, zeros), (ones[:1], ones[:1])]


# -- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize("classes", [2, 4])
def test_classification_figures_are_those_of_sklearn(classes, case):
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, true = pairs(classes)[case]
    expected = {
        "accuracy": sklearn.accuracy_score(true, predicted),
        "macro_f1": sklearn.f1_score(true, predicted, average="macro", zero_division=0),
    }
    with warnings.catch_warnings(action="ignore"):  # sklearn's, at a single label
        expected["matthews"] = sklearn.matthews_corrcoef(true, predicted)
    if classes == 2:
        expected["f1"] = sklearn.f1_score(true, predicted, zero_division=0)
    assert classification_figures(predicted, true, classes) == pytest.approx(expected, abs=1e-12)


def test_two_classes_by_hand():
    predicted, true = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    # 2 hits, 1 false alarm, 1 miss, 2 rightly left: each class has precision and recall 2/3
    assert accuracy(predicted, true) == pytest.approx(4 / 6)
    assert binary_f1(predicted, true) == pytest.approx(2 / 3)
    assert macro_f1(predicted, true) == pytest.approx(2 / 3)
    assert matthews(predicted, true) == pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))


def test_what_has_no_denominator_is_zero():
    ones, zeros = np.ones(3, int), np.zeros(3, int)
    assert binary_f1(zeros, zeros) == 0 and binary_f1(zeros, ones) == 0
    assert matthews(ones, np.array([0, 1, 1])) == 0 and matthews(ones, ones) == 0


def test_a_class_neither_true_nor_predicted_does_not_lower_the_macro_f1():
    assert macro_f1(np.array([0, 2, 2]), np.array([0, 2, 2])) == 1.0


def test_rows_of_the_confusion_are_true_classes():
    counts = confusion(np.array([1, 1, 2, 0]), np.array([0, 0, 2, 1]), 4)
    assert counts.tolist() == [[0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_the_confusion_of_nothing_is_zeros():
    assert confusion(EMPTY, EMPTY, 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("predicted", "true", "name"), [([0, 3], [0, 1], "predicted"), ([0, 1], [-1, 1], "true")])
def test_a_class_out_of_range_is_not_counted_elsewhere(predicted, true, name):
    with pytest.raises(ValueError, match=f"{name} classes must lie in 0 .. 2"):
        confusion(np.array(predicted), np.array(true), 3)


@pytest.mark.parametrize("case", range(10))
def test_the_table_of_classes_is_that_of_sklearn(case):
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, true = pairs(4)[case]
    expected = sklearn.precision_recall_fscore_support(true, predicted, labels=range(4), zero_division=0)
    counts = confusion(predicted, true, 4)
    np.testing.assert_array_equal(counts, sklearn.confusion_matrix(true, predicted, labels=range(4)))
    for found, column in zip(per_class(counts), expected, strict=True):
        np.testing.assert_allclose(found, column, atol=1e-12)


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [10**6, 4, 2])  # hardly a tie, many, nearly nothing else
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_correlations_are_those_of_scipy(levels, dtype):
    stats = pytest.importorskip("scipy.stats")
    predicted, true = np.random.RandomState(levels).randint(0, levels, (2, 40)).astype(dtype)
    true = true + predicted // 2
    figures = regression_figures(predicted, true)
    assert figures["pearson"] == pytest.approx(stats.pearsonr(np.float64(predicted), np.float64(true))[0], abs=1e-12)
    assert figures["spearman"] == pytest.approx(stats.spearmanr(predicted, true)[0], abs=1e-12)
    assert figures["mse"] == pytest.approx(np.mean((np.float64(predicted) - np.float64(true)) ** 2))


def test_correlations_by_hand():
    predicted, true = np.float32([1, 2, 3, 10]), np.float32([1, 2, 2, 4])
    # deviations (-3, -2, -1, 6) and (-1.25, -.25, -.25, 1.75): products 15, squares 50 and 4.75
    assert pearson(predicted, true) == pytest.approx(15 / math.sqrt(50 * 4.75))
    # ranks (1, 2, 3, 4) and (1, 2.5, 2.5, 4): products of the deviations 4.5, squares 5 and 4.5
    assert spearman(predicted, true) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert regression_figures(predicted, true)["mse"] == pytest.approx((0 + 0 + 1 + 36) / 4)


@pytest.mark.parametrize("constant", [np.full(50, 0.1), np.full(50, 0.1, np.float32), np.zeros(50), np.ones(50, int)])
def test_a_correlation_with_a_constant_is_nan(constant):
    varied = np.arange(50.0)
    for correlation in (pearson, spearman):
        assert math.isnan(correlation(constant, varied)) and math.isnan(correlation(varied, constant))


def test_a_correlation_of_one_example_is_nan_and_of_two_is_a_sign():
    one, up, down = np.array([1.0]), np.array([1.0, 2.0]), np.array([5.0, 4.0])
    assert math.isnan(pearson(one, one)) and math.isnan(spearman(one, one))
    assert pearson(up, down) == pytest.approx(-1) and spearman(up, up) == pytest.approx(1)


def test_predictions_that_are_not_numbers_have_no_correlation():
    broken, true = np.array([1.0, np.nan, 3.0]), np.array([1.0, 2.0, 3.0])
    assert all(math.isnan(figure) for figure in regression_figures(broken, true).values())
    infinite = np.array([1.0, np.inf, 0.0])
    assert math.isnan(pearson(infinite, true)) and spearman(infinite, true) == pytest.approx(-0.5)


# -- sets of labels ---------------------------------------------------------------------------------------------------


def label_sets():
    """(predicted, true): at random, with a label and examples that are never set, nothing predicted, nothing at all."""
    random = np.random.RandomState(0)
    predicted, true = random.rand(2, 30, 4) < 0.3
    sparse = true.copy()
    sparse[:, 2], sparse[:10] = False, False
    nothing = np.zeros((30, 4), bool)
    return [(predicted, true), (predicted & sparse, sparse), (nothing, true), (nothing, nothing), (true, true)]


@pytest.mark.parametrize("case", range(5))
def test_multilabel_figures_are_those_of_sklearn(case):
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, true = label_sets()[case]
    averages = ("micro", "macro", "samples")
    expected = {f"{a}_f1": sklearn.f1_score(true, predicted, average=a, zero_division=0) for a in averages}
    expected["exact_match"] = sklearn.accuracy_score(true, predicted)
    assert multilabel_figures(predicted, true) == pytest.approx(expected, abs=1e-12)


def test_multilabel_by_hand():
    predicted = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    true = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
    assert multilabel_figures(predicted, true) == pytest.approx(
        {
            "micro_f1": 2 * 2 / (3 + 3),
            "macro_f1": (1 + 2 / 3 + 0) / 3,
            "samples_f1": (2 / 3 + 1 + 0) / 3,
            "exact_match": 1 / 3,
        }
    )


# -- scores ----------------------------------------------------------------------------------------------------------


def auc_by_pairs(score, positive):
    wins = [(p > n) + 0.5 * (p == n) for p in score[positive] for n in score[~positive]]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("values", [1000, 5, 2])  # hardly a tie, many, nearly nothing else
def test_the_area_under_the_curve_is_the_share_of_pairs_in_order(values):
    random = np.random.RandomState(0)
    score, positive = random.randint(0, values, 60).astype(np.float32), random.rand(60) < 0.3
    assert area_under_curve(score, positive) == pytest.approx(auc_by_pairs(score, positive), abs=1e-12)


def test_the_area_under_the_curve_of_known_orders():
    positive = np.array([False, False, True, True])
    assert area_under_curve(np.float32([1, 2, 3, 4]), positive) == 1.0
    assert area_under_curve(np.float32([3, 4, 1, 2]), positive) == 0.0
    assert area_under_curve(np.float32([1, 1, 1, 1]), positive) == 0.5
    assert math.isnan(area_under_curve(np.float32([1, 2, 3, 4]), np.ones(4, bool)))


# -- nothing ----------------------------------------------------------------------------------------------------------


def test_every_figure_of_no_examples_is_nan():
    rows = np.zeros((0, 3), bool)
    for figures in (
        classification_figures(EMPTY, EMPTY, 2),
        regression_figures(np.float32(EMPTY), np.float32(EMPTY)),
        multilabel_figures(rows, rows),
    ):
        assert figures and all(math.isnan(figure) for figure in figures.values())
