"""Spans against seqeval, whose default mode is conlleval's rule; decoding against all paths; cases by hand."""

import itertools
import math

import numpy as np
import pytest

from electrax.config import UserError
from electrax.tasks.tags import (
    constrained_decode,
    convert,
    from_spans,
    marks_spans,
    most_fitting,
    span_figures,
    to_spans,
    transitions_allowed,
)

BIOES = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "LOC"))]
IOB2 = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def random_sentences(tags, count, seed):
    random = np.random.RandomState(seed)
    return [[tags[i] for i in random.randint(0, len(tags), random.randint(1, 12))] for _ in range(count)]


# -- spans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [BIOES, IOB2, ["O", "I-PER", "I-LOC"]], ids=["BIOES", "IOB2", "IO"])
def test_spans_of_valid_and_invalid_tags_are_those_of_seqeval(tags):
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    for sentence in random_sentences(tags, 300, seed=len(tags)):
        # seqeval's end is the last token
        assert to_spans(sentence) == [(kind, a, b + 1) for kind, a, b in labeling.get_entities(sentence)]
        valid = convert(sentence, "BIOES" if tags is BIOES else "IOB2")
        assert to_spans(valid) == [(kind, a, b + 1) for kind, a, b in labeling.get_entities(valid)]


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("", []),
        ("O O", []),
        ("B-X I-X O B-Y", [("X", 0, 2), ("Y", 3, 4)]),
        ("B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
        ("I-X I-X B-X O I-Y", [("X", 0, 2), ("X", 2, 3), ("Y", 4, 5)]),  # IOB1
        ("B-X I-Y", [("X", 0, 1), ("Y", 1, 2)]),  # a new type starts a span
        ("S-X S-X B-X I-X E-X", [("X", 0, 1), ("X", 1, 2), ("X", 2, 5)]),
        ("B-X O E-X", [("X", 0, 1), ("X", 2, 3)]),  # never ended, never begun
        ("E-X I-X E-X", [("X", 0, 1), ("X", 1, 3)]),
        ("B I O B", [("", 0, 2), ("", 3, 4)]),  # without types
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
    ],
)
def test_spans_by_hand(tags, spans):
    assert to_spans(tags.split()) == spans


def test_a_tag_that_marks_no_span_is_named():
    with pytest.raises(UserError, match="tag 'NOUN' marks no span: expected O, or B-, I-, E- or S- and a type"):
        to_spans(["O", "NOUN"])


def test_tags_that_mark_spans_are_told_from_others():
    assert marks_spans(BIOES) and marks_spans(["B", "I", "O"])
    assert not marks_spans(["NOUN", "O"]) and not marks_spans(["O-PER"]) and not marks_spans(["L-PER"])


# -- schemes ----------------------------------------------------------------------------------------------------------

SPANS = [("X", 0, 1), ("X", 1, 3), ("Y", 3, 5), ("Y", 6, 7)]
WRITTEN = {
    "IO": "I-X I-X I-X I-Y I-Y O I-Y",
    "IOB1": "I-X B-X I-X I-Y I-Y O I-Y",
    "IOB2": "B-X B-X I-X B-Y I-Y O B-Y",
    "BIOES": "S-X B-X E-X B-Y E-Y O S-Y",
}


@pytest.mark.parametrize("scheme", WRITTEN)
def test_each_scheme_writes_the_spans_its_own_way(scheme):
    spans = to_spans(WRITTEN["IOB2"].split())
    assert spans == SPANS
    assert from_spans(spans, 7, scheme) == WRITTEN[scheme].split()
    assert most_fitting([WRITTEN[scheme].split()]) == (scheme, 0)


@pytest.mark.parametrize(("a", "b"), [*itertools.permutations(["IOB1", "IOB2", "BIOES"], 2)])
def test_any_tags_convert_from_scheme_to_scheme_and_back(a, b):
    for sentence in random_sentences(BIOES, 50, seed=1):
        there = convert(sentence, a)
        assert to_spans(there) == to_spans(sentence)
        assert convert(convert(there, b), a) == there


def test_tags_without_types_stay_so():
    assert convert(["B", "I", "O", "B"], "BIOES") == ["B", "E", "O", "S"]


@pytest.mark.parametrize(
    ("sentences", "scheme", "unfit"),
    [
        (["O O"], "IOB2", 0),
        (["B-X O", "I-X O"], "IOB2", 1),  # the second alone would be IO
        (["B-X O", "O B-X", "O I-X"], "IOB2", 1),
        (["O I-X I-X"], "IO", 0),
        (["O I-X", "I-X B-X"], "IOB1", 0),
        (["B-X E-X", "S-X B-X"], "BIOES", 1),
        (["NOUN VERB"], None, 0),
    ],
)
def test_the_scheme_is_the_one_most_sentences_obey(sentences, scheme, unfit):
    assert most_fitting([sentence.split() for sentence in sentences]) == (scheme, unfit)


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [BIOES, IOB2], ids=["BIOES", "IOB2"])
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_figures_are_those_of_seqeval(tags, noise):
    seqeval = pytest.importorskip("seqeval.metrics")
    random = np.random.RandomState(0)
    true = [convert(sentence, "IOB2" if tags is IOB2 else "BIOES") for sentence in random_sentences(tags, 60, seed=2)]
    predicted = [[random.choice(tags) if random.rand() < noise else tag for tag in sentence] for sentence in true]
    found = span_figures(true, predicted)
    assert found.precision == pytest.approx(seqeval.precision_score(true, predicted))
    assert found.recall == pytest.approx(seqeval.recall_score(true, predicted))
    assert found.f1 == pytest.approx(seqeval.f1_score(true, predicted))
    assert found.accuracy == pytest.approx(seqeval.accuracy_score(true, predicted))
    table = seqeval.classification_report(true, predicted, output_dict=True)
    assert list(found.by_type) == ["LOC", "PER"]
    for kind, figures in found.by_type.items():
        assert figures == pytest.approx([table[kind][k] for k in ("precision", "recall", "f1-score", "support")])


def test_figures_by_hand():
    true = [["B-X", "I-X", "O", "B-Y"], ["O", "B-Y"]]
    predicted = [["B-X", "I-X", "B-X", "O"], ["O", "B-Y"]]
    found = span_figures(true, predicted)  # true X, Y, Y; found X (right), X, Y (right)
    assert found[:4] == pytest.approx((2 / 3, 2 / 3, 2 / 3, 4 / 6))
    assert found.by_type["X"] == pytest.approx((1 / 2, 1, 2 / 3, 1))
    assert found.by_type["Y"] == pytest.approx((1, 1 / 2, 2 / 3, 2))


def test_a_span_in_another_sentence_or_half_a_span_is_wrong():
    assert span_figures([["B-X", "O"], ["O", "O"]], [["O", "O"], ["B-X", "O"]]).f1 == 0
    assert span_figures([["B-X", "I-X"]], [["B-X", "O"]]).f1 == 0


def test_the_same_spans_in_two_schemes_are_equal():
    found = span_figures([["B-X", "E-X", "S-X"]], [["B-X", "I-X", "B-X"]])
    assert found.f1 == 1 and found.accuracy == pytest.approx(1 / 3)


def test_no_spans_score_zero_and_no_tokens_nan():
    assert span_figures([["O", "O"]], [["O", "O"]]) == (0, 0, 0, 1, {})
    assert span_figures([["B-X"]], [["O"]]).by_type == {"X": (0, 0, 0, 1)}
    assert all(math.isnan(figure) for figure in span_figures([], [])[:4])


@pytest.mark.parametrize(("true", "predicted"), [([["O"]], []), ([["O"]], [["O", "O"]])])
def test_tags_of_other_lengths_are_not_compared(true, predicted):
    with pytest.raises(ValueError, match="zip"):
        span_figures(true, predicted)


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tags", "scheme"), [(BIOES, "BIOES"), (IOB2, "IOB2")])
def test_transitions_allow_exactly_the_valid_sentences(tags, scheme):
    """A sequence keeps to the transitions exactly if the scheme writes its spans so."""
    allowed, starts, ends = transitions_allowed(tags)
    for length in (1, 2, 3):
        for path in itertools.product(range(len(tags)), repeat=length):
            keeps = starts[path[0]] and ends[path[-1]] and all(allowed[a, b] for a, b in itertools.pairwise(path))
            sentence = [tags[i] for i in path]
            assert keeps == (convert(sentence, scheme) == sentence), sentence


@pytest.mark.parametrize("tags", [["NOUN", "VERB", "X"], ["O", "I-X", "I-Y"]])
def test_plain_tags_and_io_allow_everything(tags):
    assert all(part.all() for part in transitions_allowed(tags))


def best_of_all_paths(scores, tags, scheme):
    paths = itertools.product(range(len(tags)), repeat=len(scores))
    valid = [path for path in paths if convert([tags[i] for i in path], scheme) == [tags[i] for i in path]]
    return max(valid, key=lambda path: sum(scores[place, tag] for place, tag in enumerate(path)))


@pytest.mark.parametrize(("tags", "scheme"), [(BIOES[::2], "BIOES"), (IOB2, "IOB2")])
def test_decoding_finds_the_best_of_all_valid_paths(tags, scheme):
    random = np.random.RandomState(0)
    changed = 0
    for length in (1, 2, 3, 4) * 6:
        scores = random.standard_normal((length, len(tags)))
        path = constrained_decode(scores, transitions_allowed(tags))
        assert tuple(path) == best_of_all_paths(scores, tags, scheme)
        changed += tuple(path) != tuple(scores.argmax(1))
    assert changed > 5


def test_decoding_by_hand():
    transitions = transitions_allowed(["O", "B-X", "I-X"])
    scores = np.log(np.float32([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]]))
    # O I is not valid: B I 0.3 * 0.6 = 0.18 is before O B 0.5 * 0.3 = 0.15
    assert constrained_decode(scores, transitions).tolist() == [1, 2]
    assert constrained_decode(scores + np.float32([[7], [-2]]), transitions).tolist() == [1, 2]  # logits
    # no score buys a start at I
    assert constrained_decode(np.float32([[0, 0, 90]] * 2), transitions).tolist() == [1, 2]


def test_plain_tags_are_decoded_one_by_one():
    scores = np.random.RandomState(0).standard_normal((9, 4))
    path = constrained_decode(scores, transitions_allowed(["A", "C", "D", "F"]))
    assert path.tolist() == scores.argmax(1).tolist()


def test_where_no_path_is_valid_the_fewest_steps_are_forbidden():
    transitions = transitions_allowed(["B-X", "I-X", "E-X"])
    # a single token: B-X cannot end, E-X cannot start, and I-X neither
    assert constrained_decode(np.float32([[1, 90, 2]]), transitions).tolist() == [2]


def test_no_token_has_no_tag():
    assert constrained_decode(np.zeros((0, 3), np.float32), transitions_allowed(["O", "B-X", "I-X"])).tolist() == []
