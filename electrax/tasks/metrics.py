"""Figures of classification, regression and multi-label predictions, as scikit-learn and scipy define them.

A precision, recall, F1 or Matthews coefficient whose denominator is zero is 0; a correlation with a constant is NaN;
and every figure of no examples at all is NaN.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real

NAN = float("nan")


def _ratio(numerator, denominator) -> np.ndarray:
    """Elementwise quotient of scalars or arrays, 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(denominator)), where=denominator != 0)


# -- classes ----------------------------------------------------------------------------------------------------------


class PerClass(NamedTuple):
    precision: Float[np.ndarray, "C"]
    recall: Float[np.ndarray, "C"]
    f1: Float[np.ndarray, "C"]
    support: Int[np.ndarray, "C"]  # examples that are of the class

    @staticmethod
    def of(hits: Int[np.ndarray, "C"], guessed: Int[np.ndarray, "C"], support: Int[np.ndarray, "C"]) -> "PerClass":
        return PerClass(_ratio(hits, guessed), _ratio(hits, support), _ratio(2 * hits, guessed + support), support)


def confusion(predicted: Int[np.ndarray, "N"], true: Int[np.ndarray, "N"], classes: int) -> Int[np.ndarray, "C C"]:
    """How many examples of each true class (row) were given each predicted class (column).

    Raises ValueError for a class that is not in 0 .. classes - 1.
    """
    for name, labels in (("predicted", predicted), ("true", true)):
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"{name} classes must lie in 0 .. {classes - 1}, found {labels.min()} .. {labels.max()}")
    pairs = true.astype(np.int64) * classes + predicted
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def _confusion_of_present(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The confusion matrix of only the classes that are predicted or true anywhere."""
    classes, index = np.unique(np.concatenate([predicted, true]), return_inverse=True)
    return confusion(index[: len(predicted)], index[len(predicted) :], len(classes))


def per_class(counts: Int[np.ndarray, "C C"]) -> PerClass:
    """Precision, recall, F1 and support of each class of a confusion matrix."""
    return PerClass.of(np.diag(counts), counts.sum(0), counts.sum(1))


def figures_of_each(kind: str, names: Sequence[str], figures: PerClass) -> list[dict[str, Any]]:
    """A table with a row for each class, whose name stands in the column `kind`."""
    columns = zip(*(column.tolist() for column in figures), strict=True)
    return [{kind: name} | dict(zip(PerClass._fields, row, strict=True))
            for name, row in zip(names, columns, strict=True)]  # fmt: skip


def confusion_table(kind: str, names: Sequence[str], counts: Int[np.ndarray, "C C"]) -> list[dict[str, Any]]:
    """A table with a row for each true class, and how often it was taken for each."""
    return [{kind: name} | {f"as {other}": n for other, n in zip(names, row, strict=True)}
            for name, row in zip(names, counts.tolist(), strict=True)]  # fmt: skip


def accuracy(predicted: Int[np.ndarray, "N"], true: Int[np.ndarray, "N"]) -> float:
    return float(np.mean(predicted == true)) if len(true) else NAN


def binary_f1(predicted: Int[np.ndarray, "N"], true: Int[np.ndarray, "N"]) -> float:
    """F1 of class 1."""
    hits = np.sum((predicted == 1) & (true == 1))
    return float(_ratio(2 * hits, np.sum(predicted == 1) + np.sum(true == 1))) if len(true) else NAN


def macro_f1(predicted: Int[np.ndarray, "N"], true: Int[np.ndarray, "N"]) -> float:
    """Mean F1 of the classes that are predicted or true anywhere."""
    return float(per_class(_confusion_of_present(predicted, true)).f1.mean()) if len(true) else NAN


def matthews(predicted: Int[np.ndarray, "N"], true: Int[np.ndarray, "N"]) -> float:
    """Matthews correlation coefficient of any number of classes (Gorodkin 2004)."""
    if not len(true):
        return NAN
    counts = _confusion_of_present(predicted, true).astype(np.float64)
    guessed, support, total = counts.sum(0), counts.sum(1), counts.sum()
    covariance = np.trace(counts) * total - guessed @ support
    return float(_ratio(covariance, np.sqrt((total**2 - guessed @ guessed) * (total**2 - support @ support))))


def classification_figures(
    predicted: Int[np.ndarray, "N"], true: Int[np.ndarray, "N"], classes: int
) -> dict[str, float]:
    """`accuracy`, `macro_f1`, `matthews`, and where there are two classes `f1` of class 1."""
    figures = {
        "accuracy": accuracy(predicted, true),
        "macro_f1": macro_f1(predicted, true),
        "matthews": matthews(predicted, true),
    }
    return figures | ({"f1": binary_f1(predicted, true)} if classes == 2 else {})


# -- numbers ----------------------------------------------------------------------------------------------------------


def pearson(predicted: Real[np.ndarray, "N"], true: Real[np.ndarray, "N"]) -> float:
    """Linear correlation; NaN where either side is constant or not finite."""
    centred = []
    for values in (predicted, true):
        values = values.astype(np.float64)
        # a constant is asked for by its range: its deviations from a rounded mean need not be zero
        if len(values) < 2 or not np.isfinite(values).all() or not np.ptp(values):
            return NAN
        values = values - values.mean()
        centred.append(values / np.linalg.norm(values))
    return float(np.clip(centred[0] @ centred[1], -1, 1))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value from 1; the mean rank for ties, NaN for NaN."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    return np.where(np.isnan(values), NAN, rank[place])


def spearman(predicted: Real[np.ndarray, "N"], true: Real[np.ndarray, "N"]) -> float:
    """Correlation of the ranks; NaN where either side is constant or holds a NaN."""
    return pearson(_ranks(predicted), _ranks(true)) if len(true) else NAN


def regression_figures(predicted: Real[np.ndarray, "N"], true: Real[np.ndarray, "N"]) -> dict[str, float]:
    """`pearson`, `spearman` and `mse`, the mean squared error in the units of `true` squared."""
    error = predicted.astype(np.float64) - true
    return {
        "pearson": pearson(predicted, true),
        "spearman": spearman(predicted, true),
        "mse": float(np.mean(error**2)) if len(true) else NAN,
    }


# -- sets of labels ---------------------------------------------------------------------------------------------------


def multilabel_figures(predicted: Bool[np.ndarray, "N C"], true: Bool[np.ndarray, "N C"]) -> dict[str, float]:
    """F1 over all cells (`micro_f1`), as the mean over labels (`macro_f1`) and over examples (`samples_f1`), and the
    share of examples whose whole set is right (`exact_match`). A label or example without any cell set counts F1 0."""
    if not len(true):
        return dict.fromkeys(("micro_f1", "macro_f1", "samples_f1", "exact_match"), NAN)

    def f1(axis: int | None) -> float:
        sizes = predicted.sum(axis) + true.sum(axis)
        return float(np.mean(_ratio(2 * (predicted & true).sum(axis), sizes)))

    return {
        "micro_f1": f1(None),
        "macro_f1": f1(0),
        "samples_f1": f1(1),
        "exact_match": float(np.mean((predicted == true).all(1))),
    }


def per_label(predicted: Bool[np.ndarray, "N C"], true: Bool[np.ndarray, "N C"]) -> PerClass:
    """Precision, recall, F1 and support of each label by itself."""
    return PerClass.of((predicted & true).sum(0), predicted.sum(0), true.sum(0))


# -- scores -----------------------------------------------------------------------------------------------------------


def area_under_curve(score: Float[np.ndarray, "N"], positive: Bool[np.ndarray, "N"]) -> float:
    """Exact area under the ROC curve: P(score of a positive > score of a negative), ties half; NaN without both."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return NAN
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # mean rank of tied scores
    return float((rank[place][positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
