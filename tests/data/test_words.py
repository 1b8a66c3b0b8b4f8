import json

import numpy as np
import pytest

from electrax.config import UserError
from electrax.data.encoded import RowBatches
from electrax.data.tokenizer import KINDS, Tokenizer
from electrax.data.words import _windows, encode_words, with_labels, word_padding

VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "##s",
    "un",
    "##aff",
    "##able",
    "日",
    "本",
    "a",
    "##a",
]
PAD, UNK, CLS, SEP, THE, CAT, S, UN, AFF, ABLE, A, MORE = 0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 13, 14


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return Tokenizer.load(path)


def lists(rows, name):
    return [part.tolist() for part in np.split(rows.tokens[name], rows.starts[1:-1])]


def test_the_first_piece_of_a_word_carries_its_number(tokenizer):
    rows = encode_words(tokenizer, [["The", "cats", "unaffable"], ["cat"]], 16)
    assert lists(rows, "ids") == [[CLS, THE, CAT, S, UN, AFF, ABLE, SEP], [CLS, CAT, SEP]]
    assert lists(rows, "word") == [[-1, 0, 1, -1, 2, -1, -1, -1], [-1, 0, -1]]
    assert rows.fields["sentence"].tolist() == [0, 1] and rows.lengths.tolist() == [8, 3]


def test_labels_stand_at_first_pieces_and_batches_pad_them_with_minus_one(tokenizer):
    rows = with_labels(encode_words(tokenizer, [["the", "cats"], ["unaffable"]], 16), [[7, 8], [9]])
    assert lists(rows, "label") == [[-1, 7, 8, -1, -1], [-1, 9, -1, -1, -1]]
    batch = rows.batch(np.array([1, 0, -1]), 6, word_padding(PAD))
    assert batch["label"].tolist() == [[-1, 9, -1, -1, -1, -1], [-1, 7, 8, -1, -1, -1], [-1] * 6]
    assert batch["ids"][0].tolist() == [CLS, UN, AFF, ABLE, SEP, PAD]
    assert batch["sentence"].tolist() == [1, 0, 0] and batch["weight"].tolist() == [1, 1, 0]


@pytest.mark.parametrize("word", ["", "   ", "\u200b", "\U0001f600", "\U0001f468\u200d\U0001f469", "zebra"])
def test_a_word_of_which_nothing_is_left_is_the_unknown_token(tokenizer, word):
    rows = encode_words(tokenizer, [["the", word, "cat"]], 16)
    assert lists(rows, "ids") == [[CLS, THE, UNK, CAT, SEP]] and lists(rows, "word") == [[-1, 0, 1, 2, -1]]


def test_a_word_that_the_tokenizer_takes_for_several_has_one_first_piece(tokenizer):
    rows = encode_words(tokenizer, [["日本", "the cat"]], 16)
    assert lists(rows, "ids") == [[CLS, 11, 12, THE, CAT, SEP]] and lists(rows, "word") == [[-1, 0, -1, 1, -1, -1]]


def test_a_special_token_in_the_text_is_an_ordinary_word(tokenizer):
    rows = encode_words(tokenizer, [["[SEP]", "the"]], 16)
    ids, word = lists(rows, "ids")[0], lists(rows, "word")[0]
    assert ids.count(SEP) == 1 and word[1] == 0 and word[ids.index(THE)] == 1


def test_nothing_to_encode_gives_no_rows(tokenizer):
    for sentences in ([], [[]], [[], []]):
        assert len(with_labels(encode_words(tokenizer, sentences, 16), sentences)) == 0
    assert encode_words(tokenizer, [[], ["cat"]], 16).fields["sentence"].tolist() == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_words_by_themselves_are_tokenised_as_in_a_text(kind):
    lines = ["the cat sat on the mat", "a dog ran under the red mat", "small dogs and one blue hat"] * 20
    tokenizer = Tokenizer.train(kind, lines, 300 if kind == "bpe" else 60)
    text = "the dogs sat and the hat ran"
    rows = encode_words(tokenizer, [text.split()], 128)
    assert rows.tokens["ids"][1:-1].tolist() == tokenizer.encode(text)[0]


def test_byte_level_bpe_without_a_prefix_space_gets_words_as_within_a_text(tmp_path):
    trained = Tokenizer.train("bpe", ["the cat sat on the mat"] * 20, 300)
    path = trained.save(tmp_path)
    spec = json.loads(path.read_text())
    spec["pre_tokenizer"]["add_prefix_space"] = False
    path.write_text(json.dumps(spec))
    rows = encode_words(Tokenizer.load(path), [["the", "cat", "sat"]], 32)
    assert rows.tokens["ids"][1:-1].tolist() == trained.encode("the cat sat")[0]


# -- sentences that do not fit ----------------------------------------------------------------------------------------


def test_a_long_sentence_is_cut_into_rows_that_overlap_by_half():
    """Six of ten words fit: words 0-5, 3-8 and 6-9, of which 0-3, 4-6 and 7-9 count."""
    assert _windows([1] * 10, 6) == [(0, 6, 0, 4), (3, 9, 4, 7), (6, 10, 7, 10)]
    assert _windows([1] * 6, 6) == [(0, 6, 0, 6)]
    assert _windows([4, 4, 4], 6) == [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]  # no two fit
    assert _windows([1, 1, 6, 1], 6) == [(0, 2, 0, 2), (2, 3, 2, 3), (3, 4, 3, 4)]


def test_every_word_of_long_sentences_counts_once_and_where_it_has_the_most_context(tokenizer):
    random = np.random.RandomState(0)
    for trial in range(60):
        max_length = int(random.randint(3, 20))
        longest = random.choice([1, 2, max_length + 3])
        sizes = random.randint(1, longest + 1, random.randint(1, 40))
        rows = encode_words(tokenizer, [["a" * size for size in sizes]], max_length)
        counted, contexts = [], {}
        for number, (ids, word) in enumerate(zip(lists(rows, "ids"), lists(rows, "word"), strict=True)):
            assert len(ids) <= max_length and ids[0] == CLS and ids[-1] == SEP and set(ids[1:-1]) <= {A, MORE}
            own = [w for w in word if w >= 0]
            heads = [place for place, token in enumerate(ids) if token == A]  # each word's first piece
            first = own[0] - heads.index(word.index(own[0]))  # number of the first word in the row
            for place, head in enumerate(heads):
                assert word[head] in (-1, first + place)
                contexts.setdefault(first + place, {})[number] = min(place, len(heads) - 1 - place)
            counted += [(w, number) for w in own]
        assert [w for w, _ in counted] == list(range(len(sizes))), trial
        assert all(contexts[w][number] == max(contexts[w].values()) for w, number in counted), trial


def test_a_word_longer_than_a_row_is_cut_to_it(tokenizer):
    rows = encode_words(tokenizer, [["cat", "a" * 50, "the"]], 8)
    assert lists(rows, "ids") == [[CLS, CAT, SEP], [CLS, A, *[MORE] * 5, SEP], [CLS, THE, SEP]]
    assert lists(rows, "word") == [[-1, 0, -1], [-1, 1, *[-1] * 6], [-1, 2, -1]]


def test_labels_of_a_cut_sentence_come_once_each(tokenizer):
    sentences = [["the"], ["cat"] * 50, [], ["cats"] * 30]
    labels = [list(range(len(words))) for words in sentences]
    rows = with_labels(encode_words(tokenizer, sentences, 12), labels)
    found = {n: [] for n in range(4)}
    for sentence, label in zip(rows.fields["sentence"].tolist(), lists(rows, "label"), strict=True):
        found[sentence] += [n for n in label if n >= 0]
    assert list(found.values()) == labels


def test_no_room_for_a_word_is_an_error(tokenizer):
    with pytest.raises(UserError, match="max_length: expected at least 3"):
        encode_words(tokenizer, [["the"]], 2)


def test_rows_of_words_make_batches(tokenizer):
    rows = with_labels(encode_words(tokenizer, [["cat"], ["the", "cats"]], 16), [[0], [1, 2]])
    batch = RowBatches.of(rows, 2, word_padding(PAD)).longest()
    assert batch["ids"].shape == batch["label"].shape == batch["word"].shape == (2, 5)
