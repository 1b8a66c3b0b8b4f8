import numpy as np
import pytest

from electrax.config import UserError
from electrax.data.templates import fill_templates
from electrax.data.tokenizer import SPECIALS, Tokenizer

WORDS = "it was great bad very the cat dog sat on mat un ##likely ##ly so and . , ? : is this good".split()
TEMPLATE = "{text} It was {label}."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(SPECIALS + WORDS), encoding="utf-8")
    return Tokenizer.load(path)


def fill(tokenizer, rows, words=("great", "very bad"), template=TEMPLATE, max_length=32):
    """(pieces of each filled template, those of them that are the label's, which rows were cut)."""
    ids, spans, cut = fill_templates(tokenizer, rows, words, template, max_length)
    assert [len(row) for row in ids] == [len(row) for row in spans] and len(ids) == len(rows) * len(words)
    pieces = [tokenizer.pieces(row) for row in ids]
    marked = [[p for p, m in zip(row, span, strict=True) if m] for row, span in zip(pieces, spans, strict=True)]
    return [" ".join(row) for row in pieces], marked, cut.tolist()


def test_a_row_is_the_template_with_each_word_whose_tokens_are_marked(tokenizer):
    ids, spans, cut = fill_templates(tokenizer, [("The cat sat",)], ("great", "very bad"), TEMPLATE, 32)
    it, was, great, bad, very, the, cat, _, sat = range(5, 14)
    stop = tokenizer.encode(".")[0][0]
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    assert ids == [[cls, the, cat, sat, it, was, great, stop, sep], [cls, the, cat, sat, it, was, very, bad, stop, sep]]
    assert spans == [[0, 0, 0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 0, 0]]
    assert cut.tolist() == [False]


def test_the_rows_follow_one_another_each_with_all_words(tokenizer):
    found, _, cut = fill(tokenizer, [("cat",), ("dog",)], ("great", "bad", "good"))
    assert [row.split()[1] for row in found] == ["cat"] * 3 + ["dog"] * 3
    assert [row.split()[4] for row in found] == ["great", "bad", "good"] * 2 and cut == [False, False]


def test_a_word_of_the_text_that_is_the_labels_is_not_marked(tokenizer):
    ids, spans, _ = fill_templates(tokenizer, [("great cat, so great",)], ("great", "bad"), TEMPLATE, 32)
    assert ids[0].count(tokenizer.encode("great")[0][0]) == 3
    assert spans[0] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]


def test_a_field_that_stands_in_a_text_is_ordinary_text(tokenizer):
    _, marked, _ = fill(tokenizer, [("the {label} sat on {text2} and {text}",)])
    assert marked == [["great"], ["very", "bad"]]


def test_the_label_may_stand_before_or_inside_the_texts(tokenizer):
    found, marked, _ = fill(tokenizer, [("the cat", "it sat")], template="{label}? {text2}, so {text}")
    assert found[0] == "[CLS] great ? it sat , so the cat [SEP]" and marked == [["great"], ["very", "bad"]]


def test_a_token_with_a_character_of_the_label_is_the_labels(tokenizer):
    _, marked, _ = fill(tokenizer, [("cat",)], ("like", "good"), "{text} is un{label}ly")
    assert marked[0] == ["##likely"]  # though "ly" is not


@pytest.mark.parametrize("kind", ["bpe", "unigram", "sentencepiece-bpe"])
def test_the_labels_tokens_spell_the_label_in_every_kind_of_vocabulary(kind):
    lines = ["the cat was great and the dog was terrible", "it was a très good day. it was so bad."] * 50
    tokenizer = Tokenizer.train(kind, lines, 300 if kind == "bpe" else 60)
    words = ("great", "so terrible", "très bad")
    ids, spans, _ = fill_templates(tokenizer, [("the dog, the cat",)], words, TEMPLATE, 128)
    for word, row, span in zip(words, ids, spans, strict=True):
        assert tokenizer.decode(np.array(row)[np.array(span) == 1]).strip() == word


# -- rows that are too long --------------------------------------------------------------------------------------------


def test_a_long_text_is_cut_at_its_end_and_the_template_never(tokenizer):
    found, marked, cut = fill(tokenizer, [("the cat sat on the mat and so on",), ("cat",)], max_length=10)
    # [CLS], "It was very bad.", [SEP] leave three places; with the shorter label the text is cut to the same
    assert found == [
        "[CLS] the cat sat it was great . [SEP]",
        "[CLS] the cat sat it was very bad . [SEP]",
        "[CLS] cat it was great . [SEP]",
        "[CLS] cat it was very bad . [SEP]",
    ]
    assert marked == [["great"], ["very", "bad"]] * 2 and cut == [True, False]


def test_a_row_that_just_fits_is_whole(tokenizer):
    for length, whole in ((12, True), (11, False)):
        found, _, cut = fill(tokenizer, [("the cat sat on mat",)], max_length=length)
        assert cut == [not whole] and found[0].split()[1:6] == ["the", "cat", "sat", "on", "mat" if whole else "it"]


def test_of_a_pair_the_longer_text_is_cut(tokenizer):
    template = "{text}? {label}, {text2}"
    rows = [("the cat sat on the mat", "dog"), ("dog", "the cat sat on the mat"), ("the cat sat on", "it is so very")]
    found, _, _ = fill(tokenizer, rows, ("great", "bad"), template, 10)
    assert found[0] == "[CLS] the cat sat on ? great , dog [SEP]"
    assert found[2] == "[CLS] dog ? great , the cat sat on [SEP]"
    assert found[4] == "[CLS] the cat sat ? great , it is [SEP]"  # of equal ones the second first


def test_a_template_that_leaves_no_place_for_the_text_is_an_error(tokenizer):
    with pytest.raises(UserError, match=r"template '.*' with 'great' leaves no text of 6 tokens"):
        fill(tokenizer, [("cat",)], max_length=6)
    assert fill(tokenizer, [("",)], max_length=8)[0][0] == "[CLS] it was great . [SEP]"


# -- bad templates and labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template", ["It was {label}.", "{text}", "{text} {label} {label}", "{text} {label} {why}", "", "{text2} {label}"]
)
def test_a_template_without_its_fields_or_with_others_is_an_error(tokenizer, template):
    with pytest.raises(UserError, match=r"template: expected {text} and {label} once, and {text2} for pairs, not") as e:
        fill(tokenizer, [("cat",)], template=template)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "labels: expected at least two, not 0"),
        (("great",), "labels: expected at least two, not 1"),
        (("great", " "), "labels: label 2 is empty; expected a word"),
        (("great", "bad", "great"), "labels: 'great' stands for two of them; expected a word of its own for each"),
        (("great", "\u200b"), r"labels: the tokenizer finds no token in '\\u200b'"),
    ],
)
def test_bad_labels_are_errors(tokenizer, words, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        fill(tokenizer, [("cat",)], words)


def test_a_row_of_another_number_of_texts_is_an_error(tokenizer):
    with pytest.raises(UserError, match=r"template '{text} It was {label}\.' takes texts: 1, but row 2 has 2"):
        fill(tokenizer, [("cat",), ("cat", "dog")])


def test_no_rows_are_none(tokenizer):
    assert fill(tokenizer, []) == ([], [], [])
