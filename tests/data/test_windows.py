import dataclasses
import pathlib

import numpy as np
import pytest

from electrax.config import UserError
from electrax.data.examples import Answer, BadRows, QuestionExample
from electrax.data.tokenizer import Tokenizer
from electrax.data.windows import encode_context, make_windows, max_context, window_starts

SHARED = pathlib.Path(__file__).parents[2].parent / "shared"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] who sat where the cat on mat red and ran far ##s cafe 東 京 , .".split()
PAD, UNK, CLS, SEP = 0, 1, 2, 3
ID = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(WORDS), encoding="utf-8")
    return Tokenizer.load(path)


def question(context, answer=None, text="who sat", impossible=False, start=None):
    if answer is None:
        answers = ()
    else:
        answers = (Answer(answer, context.index(answer) if start is None else start),)
    return QuestionExample("f.json, question 1", "1", text, context, answers, impossible)


def ids(text):
    return [ID[word] for word in text.split()]


def row(windows, number):
    rows = windows.rows
    return rows.tokens["ids"][rows.starts[number] : rows.starts[number + 1]].tolist()


def fields(windows, *names):
    return [tuple(windows.rows.fields[name][i].item() for name in names) for i in range(len(windows.rows))]


# -- windows ----------------------------------------------------------------------------------------------------------


def test_a_short_context_is_one_window_with_its_answers_tokens(tokenizer):
    windows = make_windows(tokenizer, [question("The cats sat.", "cats")], 128)
    assert len(windows.rows) == 1
    assert row(windows, 0) == ids("[CLS] who sat [SEP] the cat ##s sat . [SEP]")
    assert fields(windows, "question", "start", "end", "impossible", "offset", "document") == [(0, 5, 6, 0.0, 4, 0)]
    assert windows.rows.fields["question"].dtype == np.int32
    assert windows.rows.fields["impossible"].dtype == np.float32
    assert windows.spans[0].tolist() == [[0, 3], [4, 7], [7, 8], [9, 12], [12, 13]]


def test_windows_advance_by_the_stride_and_the_last_ends_with_the_context(tokenizer):
    words = "the cat sat on the red mat and ran far"  # 10 tokens; 5 beside a question of two
    windows = make_windows(tokenizer, [question(words, "red mat")], 10, doc_stride=3, max_query=2)
    assert [row(windows, i) for i in range(3)] == [
        ids("[CLS] who sat [SEP] the cat sat on the [SEP]"),
        ids("[CLS] who sat [SEP] on the red mat and [SEP]"),
        ids("[CLS] who sat [SEP] mat and ran far [SEP]"),
    ]
    # not in the first window, all of it in the second, and only its second half in the last
    assert fields(windows, "start", "end", "document") == [(0, 0, 0), (6, 7, 3), (0, 0, 6)]
    assert windows.parts() == [slice(0, 3)]
    assert windows.sizes(slice(0, 3)).tolist() == [5, 5, 4]


def test_a_stride_longer_than_a_window_skips_no_token():
    assert window_starts(10, 4, 100) == [0, 4, 8]
    assert window_starts(8, 4, 2) == [0, 2, 4]
    assert window_starts(4, 4, 1) == [0]
    assert window_starts(0, 4, 1) == [0]


def test_a_question_is_cut_to_max_query_tokens(tokenizer):
    windows = make_windows(tokenizer, [question("the mat", "mat", "who sat where the cat sat")], 10, max_query=3)
    assert row(windows, 0) == ids("[CLS] who sat where [SEP] the mat [SEP]")
    assert fields(windows, "start", "end", "offset") == [(6, 6, 5)]


def test_an_impossible_question_and_one_without_answers_point_at_cls(tokenizer):
    examples = [question("the cat", impossible=True), question("the cat")]
    windows = make_windows(tokenizer, examples, 128)
    assert fields(windows, "question", "start", "end", "impossible") == [(0, 0, 0, 1.0), (1, 0, 0, 0.0)]


def test_windows_without_the_answer_keep_the_questions_flag(tokenizer):
    examples = [question("the cat sat on the mat", impossible=True), question("the cat sat on the mat", "mat")]
    windows = make_windows(tokenizer, examples, 8, doc_stride=3, max_query=2)
    assert fields(windows, "question", "start", "impossible") == [(0, 0, 1.0), (0, 0, 1.0), (1, 0, 0.0), (1, 6, 0.0)]


def test_an_answer_that_meets_no_token_is_bad_and_the_others_are_numbered_without_it(tokenizer):
    examples = [question("the cat"), question("the  cat", "  "), question("the mat", "mat")]
    windows = make_windows(tokenizer, examples, 128)
    assert windows.examples == (examples[0], examples[2])
    assert windows.rows.fields["question"].tolist() == [0, 1]
    assert len(windows.spans) == 2
    (bad,) = windows.bad
    assert (bad.where, bad.kind) == ("f.json, question 1", "answer")
    assert bad.message == "expected an answer that holds a word, found '  '"


def test_part_of_a_token_is_answered_with_the_token(tokenizer):
    windows = make_windows(tokenizer, [question("the mat sat", "at s")], 128)
    assert fields(windows, "start", "end") == [(5, 6)]


@pytest.mark.parametrize("context", [" ", "\u200b"])
def test_a_context_without_a_token_still_has_a_window(tokenizer, context):
    windows = make_windows(tokenizer, [question(context), question("the mat", "mat")], 128)
    assert row(windows, 0) == ids("[CLS] who sat [SEP] [SEP]")
    assert windows.parts() == [slice(0, 1), slice(1, 2)]
    assert windows.sizes(slice(0, 1)).tolist() == [0]


def test_no_question_gives_no_window(tokenizer):
    windows = make_windows(tokenizer, [], 128)
    assert len(windows.rows) == 0
    assert windows.parts() == []


def test_a_window_too_short_for_the_question_is_named(tokenizer):
    with pytest.raises(UserError, match=r"^max_length is 60, but must be at least 68: max_query 64, \[CLS\]"):
        make_windows(tokenizer, [question("the cat")], 60)
    with pytest.raises(UserError, match="doc_stride and max_query must be at least 1, not 0 and 64"):
        make_windows(tokenizer, [question("the cat")], 128, doc_stride=0)


# -- windows kept between runs ----------------------------------------------------------------------------------------

LONG = "the cat sat on the red mat and ran far"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "electrax" / "rows"


@pytest.fixture
def encoded(monkeypatch):
    """The texts that are tokenized from now on."""
    texts = []
    encode, encode_batch = Tokenizer.encode, Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: texts.append(text) or encode(self, text))
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, some: texts.extend(some) or encode_batch(self, some))
    return texts


def asked():
    """Two questions on one context of several windows; one that is bad; one impossible, on a context with accents."""
    return [
        question(LONG, "red mat"),
        question(LONG, "ran", "where"),
        question("the  cat", "  "),
        question("the Cafe\u0301 東京", impossible=True),
    ]


def short_windows(tokenizer, examples, keep=True, max_length=10, doc_stride=3, max_query=2):
    return make_windows(tokenizer, examples, max_length, doc_stride, max_query, keep)


def assert_same(found, expected):
    assert found.rows.sha256() == expected.rows.sha256()
    for name, values in expected.rows.fields.items():
        assert found.rows.fields[name].dtype == values.dtype
    assert (found.examples, found.bad) == (expected.examples, expected.bad)
    for some, wanted in zip(found.spans, expected.spans, strict=True):
        assert some.tolist() == wanted.tolist() and some.dtype == wanted.dtype


def test_the_same_questions_are_made_into_windows_once(tokenizer, cache, encoded):
    expected = short_windows(tokenizer, asked(), keep=False)
    assert not cache.exists()
    assert_same(short_windows(tokenizer, asked()), expected)
    encoded.clear()
    found = short_windows(tokenizer, asked())
    assert encoded == []
    assert_same(found, expected)
    assert row(found, 1) == ids("[CLS] who sat [SEP] on the red mat and [SEP]")
    assert fields(found, "question", "start", "end", "document")[1] == (0, 6, 7, 3)
    assert found.rows.fields["question"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert [len(example.answers) for example in found.examples] == [1, 1, 0]
    assert found.bad[0].message == "expected an answer that holds a word, found '  '"
    assert found.spans[2].tolist() == [[0, 3], [4, 9], [10, 11], [11, 12]]


def test_no_question_may_be_kept_too(tokenizer, cache):
    for _ in range(2):
        windows = short_windows(tokenizer, [])
        assert (len(windows.rows), windows.examples, windows.spans, windows.bad) == (0, (), (), ())


def test_windows_of_other_questions_or_settings_are_made_anew(tokenizer, cache, encoded, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*WORDS, "a"]), encoding="utf-8")
    first = asked()[0]
    others = [
        {"examples": [dataclasses.replace(first, context=f"{LONG} .")]},
        {"examples": [dataclasses.replace(first, question="where")]},
        {"examples": [dataclasses.replace(first, answers=(Answer("red", LONG.index("red")),))]},
        {"examples": [dataclasses.replace(first, answers=(Answer("the", LONG.index("the red")),))]},
        {"examples": [dataclasses.replace(first, answers=())]},
        {"examples": [dataclasses.replace(first, answers=(), impossible=True)]},
        {"examples": [first, first]},
        {"max_length": 9},
        {"doc_stride": 2},
        {"max_query": 1},
        {"tokenizer": Tokenizer.load(path)},
    ]
    values = {"tokenizer": tokenizer, "examples": [first]}
    short_windows(**values)
    for other in others:
        expected = short_windows(**(values | other), keep=False)
        encoded.clear()
        found = short_windows(**(values | other))
        assert encoded != [], other
        assert_same(found, expected)


def test_windows_that_were_kept_belong_to_the_questions_that_are_asked(tokenizer, cache, encoded):
    short_windows(tokenizer, asked())
    encoded.clear()
    renamed = [dataclasses.replace(example, id="other", where="g.json") for example in asked()]
    found = short_windows(tokenizer, renamed)
    assert encoded == []
    assert found.examples == (*renamed[:2], renamed[3])
    assert found.bad[0].where == "g.json"


def test_a_damaged_file_of_kept_windows_is_made_anew(tokenizer, cache, encoded):
    expected = short_windows(tokenizer, asked())
    whole = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(whole) == 2  # the contexts and the windows
    for path, content in whole.items():
        for damaged in (b"", content[:-1], content[:200] + bytes([content[200] ^ 1]) + content[201:]):
            path.write_bytes(damaged)
            encoded.clear()
            assert_same(short_windows(tokenizer, asked()), expected)
            assert encoded != []
            assert path.read_bytes() == content


# -- maximal context --------------------------------------------------------------------------------------------------


def test_a_token_belongs_to_the_window_with_most_on_its_poorer_side():
    # BERT's example: "the man went to the", "to the store and bought", "and bought a gallon of"
    assert max_context(np.array([0, 3, 6]), np.array([5, 5, 5])).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_of_equal_windows_the_longer_wins_and_then_the_first():
    # token 3: 1 left in the first, 1 left in the second, which is longer by one
    assert max_context(np.array([2, 2]), np.array([3, 4])).tolist()[2:] == [1, 1, 1, 1]
    assert max_context(np.array([0, 0]), np.array([3, 3])).tolist() == [0, 0, 0]


# -- characters -------------------------------------------------------------------------------------------------------


def test_characters_survive_accents_emoji_chinese_and_repeated_spaces(tokenizer):
    context = "The  Café, 😀😀 \n 東京  cafe\u0301s "
    tokens, spans = encode_context(tokenizer, context)
    assert tokens.tolist() == [ID["the"], ID["cafe"], ID[","], UNK, ID["東"], ID["京"], ID["cafe"], ID["##s"]]
    texts = [context[start:end] for start, end in spans]
    assert texts == ["The", "Café", ",", "😀😀", "東", "京", "cafe\u0301", "s"]


def test_an_accent_of_its_own_at_the_end_belongs_to_its_letter(tokenizer):
    context = "the cafe\u0301 sat"  # BERT's tokenizer drops the accent
    _, spans = encode_context(tokenizer, context)
    assert [context[start:end] for start, end in spans] == ["the", "cafe\u0301", "sat"]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_every_kind_of_tokenizer_finds_the_characters_of_an_answer(kind):
    lines = ["the cat sat on the red mat and ran", "a café in 東京 is far 😀 away"] * 20
    tokenizer = Tokenizer.train(kind, lines, 300 if kind == "bpe" else 60)
    context = "The  cat 😀\tran  to the Café in 東京, e\u0301te\u0301  😀"
    answers = ["cat", "😀", "Café in 東京", "ran  to", "e\u0301te\u0301"]
    windows = make_windows(tokenizer, [question(context, answer) for answer in answers], 160, max_query=32)
    assert not windows.bad and len(windows.rows) == len(answers)
    for answer, (start, end, offset) in zip(answers, fields(windows, "start", "end", "offset"), strict=True):
        spans = windows.spans[0]
        found = context[spans[start - offset, 0] : spans[end - offset, 1]]
        assert answer in found and not found.isspace() and found == found.strip()


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
@pytest.mark.parametrize("max_length", [384, 96])
def test_the_windows_of_real_questions_cover_their_answers(max_length):
    from electrax.data.squad import read_squad

    tokenizer = Tokenizer.load(SHARED / "data" / "vocab" / "vocab.txt")
    examples = read_squad(SHARED / "data" / "squad" / "dev-v1.1.json.gz", BadRows())[::40]
    windows = make_windows(tokenizer, examples, max_length, doc_stride=32, max_query=32)
    assert not windows.bad and len(windows.examples) == len(examples)
    names = ("start", "end", "offset", "document")
    targets, exact = fields(windows, *names), 0
    for example, spans, part in zip(windows.examples, windows.spans, windows.parts(), strict=True):
        found = set()
        for start, end, offset, document in targets[part]:
            if start:
                move = document - offset
                found.add((int(spans[start + move, 0]), int(spans[end + move, 1])))
        ((start, end),) = found  # in some window, and in every one of them the same characters
        answer = example.answers[0]
        assert answer.text in example.context[start:end]
        exact += (start, end) == (answer.start, answer.start + len(answer.text))
    assert exact / len(examples) > 0.99  # a few annotations cut words
