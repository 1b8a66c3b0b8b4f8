"""Scores of extracted answers as the official scripts of SQuAD 1.1, SQuAD 2.0 and MRQA compute them.

A question without a gold answer has none in its text; its right prediction is the empty text. A set with such questions
is scored as SQuAD 2.0, any other as 1.1; the two differ otherwise only in gold answers that normalise to nothing.
"""

import collections
import re
import string

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only, as in the official scripts


def normalize_answer(text: str) -> str:
    """Lower case without ASCII punctuation, articles and superfluous spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def exact_match(predicted: str, gold: str) -> float:
    return float(normalize_answer(predicted) == normalize_answer(gold))


def token_f1(predicted: str, gold: str) -> float:
    """F1 of the normalised words, each counted as often as it occurs; 0 where they share none, or have none."""
    predicted_words, gold_words = normalize_answer(predicted).split(), normalize_answer(gold).split()
    shared = (collections.Counter(predicted_words) & collections.Counter(gold_words)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted_words), shared / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def question_scores(
    predictions: dict[str, str], golds: dict[str, list[str]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Exact match and F1 (0 .. 1) of each question, the best over its gold answers; 0 without a prediction."""
    exact, f1 = {}, {}
    is_v2 = not all(golds.values())
    for question, answers in golds.items():
        if is_v2:
            answers = [answer for answer in answers if normalize_answer(answer)]
        text = predictions.get(question)
        if text is None:
            exact[question] = f1[question] = 0.0
        elif not answers:
            exact[question] = f1[question] = exact_match(text, "")
        else:
            exact[question] = max(exact_match(text, answer) for answer in answers)
            f1[question] = max(token_f1(text, answer) for answer in answers)
    return exact, f1


def question_figures(predictions: dict[str, str], golds: dict[str, list[str]]) -> dict[str, float]:
    """`exact` and `f1` in percent, `total` questions and those `missing` a prediction, which count 0.

    With unanswerable questions also HasAns_ and NoAns_ exact, f1 and total, of the kinds that occur. Without a question
    exact and f1 are NaN.
    """
    exact, f1 = question_scores(predictions, golds)
    figures = _means(exact, f1, list(golds), "")
    figures["missing"] = float(sum(question not in predictions for question in golds))
    answerable = [question for question in golds if golds[question]]
    unanswerable = [question for question in golds if not golds[question]]
    if unanswerable:
        figures |= _means(exact, f1, unanswerable, "NoAns_")
        figures |= _means(exact, f1, answerable, "HasAns_") if answerable else {}
    return figures


def _means(exact: dict[str, float], f1: dict[str, float], questions: list[str], prefix: str) -> dict[str, float]:
    total = len(questions)
    figures = {}
    for name, scores in (("exact", exact), ("f1", f1)):
        figures[prefix + name] = 100 * sum(scores[q] for q in questions) / total if total else float("nan")
    return figures | {prefix + "total": float(total)}


# -- a threshold for "no answer" --------------------------------------------------------------------------------------


def apply_threshold(predictions: dict[str, str], na_scores: dict[str, float], threshold: float) -> dict[str, str]:
    """The predictions with an empty text wherever the score for "no answer" is above the threshold."""
    return {question: "" if na_scores[question] > threshold else text for question, text in predictions.items()}


def best_threshold(
    predictions: dict[str, str],
    golds: dict[str, list[str]],
    na_scores: dict[str, float],
    scores: dict[str, float],
) -> tuple[float, float]:
    """The greatest mean of `scores` (exact match or F1 by question) over all thresholds, in percent, and its threshold.

    The sweep of evaluate-v2.0.py: from no answer anywhere, with threshold 0, the predictions (of before any threshold)
    are let in by ascending `na_scores`. Like that script it may stop between equal scores, where no threshold reaches
    the mean, and says 0 where no answer at all is best, even if some scores are below 0.
    """
    if not golds:
        return float("nan"), 0.0
    current = best = float(sum(not answers for question, answers in golds.items() if question in predictions))
    threshold = 0.0
    for question in sorted(na_scores, key=na_scores.__getitem__):
        if question not in golds or question not in predictions:
            continue
        if golds[question]:
            current += scores[question]
        elif predictions[question]:
            current -= 1
        if current > best:
            best, threshold = current, na_scores[question]
    return 100 * best / len(golds), threshold


def threshold_figures(
    predictions: dict[str, str], golds: dict[str, list[str]], na_scores: dict[str, float]
) -> dict[str, float]:
    """`best_exact`, `best_exact_thresh`, `best_f1` and `best_f1_thresh`."""
    figures = {}
    for name, scores in zip(("best_exact", "best_f1"), question_scores(predictions, golds), strict=True):
        figures[name], figures[name + "_thresh"] = best_threshold(predictions, golds, na_scores, scores)
    return figures
