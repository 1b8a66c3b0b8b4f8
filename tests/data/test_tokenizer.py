import pathlib

import hypothesis
import pytest
from hypothesis import strategies

from electrax.config import UserError
from electrax.data.tokenizer import KINDS, Tokenizer

LINES = ["The cat sat on the mat, and the cats sat too.", "A café in Zürich: über-cool!", "unaffable 日本語 naïve"] * 30
REAL_VOCABULARY = pathlib.Path(__file__).parents[3] / "shared" / "data" / "vocab" / "vocab.txt"
VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "un",
    "##aff",
    "##able",
    "cafe",
    "café",
    "Café",
    "[",
    "]",
    "mask",
    "sep",
    "!",
    "##s",
    "cat",
    "日",
    "##a",
    "a",
]
HARD = [
    "The CAFÉ café Café Cafe\u0301!!",
    "unaffable cats\tcat\u00a0cat\u200bcat\x00\ufffd",
    "日本語 the日the [MASK] [SEP]",
    "a" * 200 + " " + "a" * 201,
    "İstanbul ß ﬁ ½ \U0001f600",
    "\u05e9\u05dc\u05d5\u05dd the \u0645\u0631\u062d\u0628\u0627 \u200fcat\u200e \u202ecats\u202c",  # right to left
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 cat\ufe0f \U0001f1e9\U0001f1ea \u2764\ufe0f",  # joined emoji, flags
    "cat\x01\x7f\x85s \u2028the\u2029 \ufeffthe\xadcat \r\n\t\x0b\x0c un\x1faffable",
    "e\u0301\u0323 c\u0327afe\u0301 \u1100\u1161\u11a8 \ud55c\uae00 \u0e01\u0e33",
    "\u3042\u304c\u30ab\u3099 \u4e00\u3400\U00020000",
    "\uff23\uff21\uff34 \u2460 \u00b2 \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u00df\u1e9e",
    "$1,000.00--the... \u201ccat\u201d\u2014cat\u2019s a_cat ^`|~ \u00a1cat!",
    "a" * 100 + " " + "a" * 101 + " cats",
    "",
    "   ",
]


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("lowercase, strip_accents", [(True, None), (False, None), (True, False), (False, True)])
def test_vocab_txt_encodes_as_transformers_does(vocab, lowercase, strip_accents):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ElectraTokenizerFast(
        vocab=str(vocab), do_lower_case=lowercase, strip_accents=strip_accents, tokenize_chinese_chars=True
    )
    theirs.backend_tokenizer.encode_special_tokens = True
    ours = Tokenizer.load(vocab, lowercase, strip_accents, longest_word=100)  # where transformers gives up
    expected = [theirs.backend_tokenizer.encode(line, add_special_tokens=False) for line in HARD]
    assert ours.encode_batch(HARD) == [e.ids for e in expected]
    for line, e in zip(HARD, expected, strict=True):
        assert ours.encode(line) == (e.ids, [tuple(o) for o in e.offsets])


@pytest.mark.skipif(not REAL_VOCABULARY.is_file(), reason="needs the published vocabulary")
@pytest.mark.parametrize("lowercase", [True, False])
def test_random_text_is_encoded_as_transformers_does_with_the_published_vocabulary(lowercase):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ElectraTokenizerFast(vocab=str(REAL_VOCABULARY), do_lower_case=lowercase)
    theirs.backend_tokenizer.encode_special_tokens = True
    ours = Tokenizer.load(REAL_VOCABULARY, lowercase, longest_word=100)

    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @hypothesis.given(strategies.text(max_size=60))
    def same(text):
        expected = theirs.backend_tokenizer.encode(text, add_special_tokens=False)
        assert ours.encode(text) == (expected.ids, [tuple(o) for o in expected.offsets])
        assert ours.encode_batch([text]) == [expected.ids]

    same()


def test_wordpiece_takes_words_of_200_characters_and_no_longer(vocab):
    tokenizer = Tokenizer.load(vocab)
    at_most, over = tokenizer.encode_batch(["a" * 200, "a" * 201])
    assert tokenizer.pieces(at_most) == ["a"] + ["##a"] * 199 and over == [tokenizer.unk_id]


def test_wordpiece_literal_values(vocab):
    tokenizer = Tokenizer.load(vocab)
    assert tokenizer.pieces(tokenizer.encode_batch(["The unaffable CAFÉ cats!"])[0]) == [
        *["the", "un", "##aff", "##able", "cafe", "cat", "##s", "!"]
    ]
    assert tokenizer.special_ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert tokenizer.vocab_size == len(VOCAB)


@pytest.mark.parametrize(
    "pieces, word",
    [
        (["the", "##s", "ℝ", "[unused1]"], "the"),  # of ℝ there is no small letter
        (["the", "The"], "The"),
        (["the", "##S"], "[UNK]"),
        (["the", "[X"], "[UNK]"),
    ],
)
def test_a_vocabulary_with_capitals_is_taken_for_one_of_text_as_it_is(tmp_path, pieces, word):
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCAB[:5], *pieces]) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path, lowercase=None)
    assert tokenizer.pieces(tokenizer.encode_batch(["The"])[0]) == [word]


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    return request.param, Tokenizer.train(request.param, LINES, 300 if request.param == "bpe" else 90)


def test_training_twice_gives_the_same_bytes(trained):
    kind, tokenizer = trained
    assert Tokenizer.train(kind, LINES, 300 if kind == "bpe" else 90).sha256 == tokenizer.sha256


def test_saving_and_loading_keep_the_hash_and_the_ids(trained, tmp_path):
    _, tokenizer = trained
    file = tokenizer.save(tmp_path)
    for path in (file, tmp_path):
        again = Tokenizer.load(path)
        assert again.sha256 == tokenizer.sha256 and again.encode_batch(LINES) == tokenizer.encode_batch(LINES)


def test_special_tokens_never_come_from_text(trained):
    _, tokenizer = trained
    special = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id}
    for text in ("[MASK]", "a [SEP] b[CLS]", "[PAD][PAD]", "</s> <mask>", "［ＭＡＳＫ］"):
        ids = tokenizer.encode_batch([text])[0]
        assert special.isdisjoint(ids) and tokenizer.encode(text)[0] == ids


def test_a_mask_in_text_is_recognised_on_request(trained):
    _, tokenizer = trained
    ids, offsets = tokenizer.encode("the [MASK] sat", allow_special=True)
    assert ids.count(tokenizer.mask_id) == 1 and offsets[ids.index(tokenizer.mask_id)] == (4, 10)
    plain = tokenizer.encode_batch(["the", " sat"])
    assert ids == [*plain[0], tokenizer.mask_id, *plain[1]]


def test_offsets_are_characters_of_the_original_text(trained):
    _, tokenizer = trained
    text = "über the  cat"
    ids, offsets = tokenizer.encode(text)
    words = [text[start:end] for start, end in offsets]
    assert "".join(words) == "überthecat" and ids == tokenizer.encode_batch([text])[0]
    assert offsets[-1][1] == len(text) and all(len(tokenizer.pieces([i])) == 1 for i in ids)


def test_decoding_gives_the_text_back_without_special_tokens(trained):
    _, tokenizer = trained
    ids = tokenizer.encode_batch(["the cat sat"])[0]
    assert tokenizer.decode([tokenizer.cls_id, *ids, tokenizer.sep_id, tokenizer.pad_id]) == "the cat sat"


def test_bpe_knows_every_byte_and_a_first_word_like_any_other():
    tokenizer = Tokenizer.train("bpe", LINES, 300)
    assert tokenizer.unk_id not in tokenizer.encode_batch(["\U0001f600 Ж"])[0]
    assert tokenizer.encode_batch(["the"]) == tokenizer.encode_batch([" the"])


def test_wordpiece_training_refuses_an_iterator_it_could_read_only_once():
    with pytest.raises(TypeError, match="reads the lines twice"):
        Tokenizer.train("wordpiece", iter(LINES), 90)


def foreign_unigram():
    """A tokenizer.json whose model holds the special tokens as ordinary pieces, as XLM-R's does."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers

    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<mask>", 0.0)]
    pieces += [(c, -5.0) for c in "▁<>/smakcat"]
    backend = HuggingFace(models.Unigram(list(dict(pieces).items()), unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    return backend


def test_a_foreign_vocabulary_with_other_names_cannot_leak_special_tokens_either(tmp_path):
    foreign_unigram().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    ids = tokenizer.encode_batch(["cat </s> cat<mask>"])[0]
    assert {0, 2, 3, 4}.isdisjoint(ids)
    assert (
        tokenizer.pieces(ids)[:6] == ["▁", "c", "a", "t", "▁", "<"] and "".join(tokenizer.pieces(ids)).count("<") == 2
    )
    assert tokenizer.mask_id in tokenizer.encode("cat<mask>", allow_special=True)[0]


def test_the_truncation_and_padding_of_a_tokenizer_json_are_turned_off(tmp_path):
    foreign_unigram().save(str(tmp_path / "tokenizer.json"))
    assert [len(ids) for ids in Tokenizer.load(tmp_path).encode_batch(["cat", "cat cat"])] == [4, 8]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.txt", "[PAD]\n[UNK]\nthe\n", r"no \[CLS\] or <s> or <cls>, no \[SEP\] or </s> or <sep>, no \[MASK\]"),
        ("vocab.txt", "a\nb\na\n", "line 3: the token 'a' is already in line 1"),
        ("tokenizer.json", "{}", "not a tokenizer.json"),
        ("tokenizer.model", "x", "not a SentencePiece model"),
        ("vocab.csv", "x", "ending in .json, .model or .txt"),
        ("gone/", None, "cannot be read .*; expected a tokenizer"),
    ],
)
def test_a_bad_tokenizer_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_an_empty_directory_and_an_unknown_kind_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="expected one of tokenizer.json, tokenizer.model, vocab.txt"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="expected one of wordpiece, bpe"):
        Tokenizer.train("wordpieces", LINES, 90)
    with pytest.raises(UserError, match="vocab_size 10"):
        Tokenizer.train("unigram", LINES, 10)


def test_a_token_twice_in_a_vocabulary_with_carriage_returns_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"a\r\nb\r\na\r\n")
    with pytest.raises(UserError, match="line 3: the token .* is already in line 1"):
        Tokenizer.load(tmp_path / "vocab.txt")


def test_a_tokenizer_that_cannot_encode_what_it_does_not_know_is_refused(tmp_path):
    path = Tokenizer.train("wordpiece", ["a cat"], 50).save(tmp_path)
    path.write_text(path.read_text().replace('"vocab":{"[PAD]":0,"[UNK]":1', '"vocab":{"[PAD]":0'))
    with pytest.raises(UserError, match="tokenizer.json: cannot encode text .*Missing .UNK. token"):
        Tokenizer.load(path)
