import gzip
import pathlib

import pytest

from electrax.config import UserError
from electrax.data.conll import read_conll, read_conllu
from electrax.data.examples import BadRows

REAL = pathlib.Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def read(tmp_path):
    """([(line, words, tags)], counts of bad rows)."""

    def read(data, skip=False, name="a.conll", **settings):
        path, bad = tmp_path / name, BadRows("skip" if skip else "error")
        data = data.encode() if isinstance(data, str) else data
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        rows = (read_conllu if "conllu" in name else read_conll)(path, bad, **settings)
        bad.close(path)
        return [(int(row.where.split()[-1]), row.words, row.tags) for row in rows], dict(bad.counts)

    return read


@pytest.mark.parametrize("name", ["a.conll", "a.conll.gz"])
@pytest.mark.parametrize("separator", ["\t", " ", "   "])
def test_blank_lines_end_sentences(read, name, separator):
    data = "\ufeff\n-DOCSTART- -X- O\n\nEU|NNP|B-ORG\r\nrejects|VBZ|O\r\n\r\n\t\n\nGerman|JJ|B-MISC".replace(
        "|", separator
    )
    expected = [(4, ("EU", "rejects"), ("B-ORG", "O")), (9, ("German",), ("B-MISC",))]
    assert read(data, name=name) == (expected, {})


def test_columns_can_be_chosen(read):
    data = "1 EU NNP B-ORG\n2 rejects VBZ O\n"
    assert read(data, word_column=1, tag_column=2)[0] == [(1, ("EU", "rejects"), ("NNP", "VBZ"))]
    assert read(data, word_column=1, tag_column=None)[0] == [(1, ("EU", "rejects"), None)]


def test_a_tab_alone_separates_where_there_is_one(read):
    assert read("New York\tB-LOC\n\u00a0x y\tO\n")[0] == [(1, ("New York", "x y"), ("B-LOC", "O"))]


def test_other_unicode_spaces_are_part_of_a_word(read):
    assert read("10\u00a0000 O\nm\u2028 O\n#x O\n")[0] == [(1, ("10\u00a0000", "m", "#x"), ("O", "O", "O"))]


@pytest.mark.parametrize(
    "line, kind, message",
    [
        ("b", "ragged row", "expected 2 columns, found 1"),
        ("b c O", "ragged row", "expected 2 columns, found 3"),
        ("b\tO\t", "ragged row", "expected 2 columns, found 3"),
        ("\tO", "empty text", "expected a word, found none"),
        ("b\t", "label", "expected a tag for the word 'b', found none"),
        ("b\0 O", "NUL byte", "found a NUL byte"),
        (b"b\xff O", "encoding", "byte 2: expected UTF-8, found 0xff"),
    ],
)
def test_a_bad_line_is_named_and_its_sentence_left_out(read, line, kind, message):
    data = b"a O\n\na O\n" + (line if isinstance(line, bytes) else line.encode()) + b"\nc O\n\nd O\n"
    with pytest.raises(UserError, match=rf"1 bad row \(1 {kind}\): .*a.conll, line 4: .*{message}"):
        read(data)
    assert read(data, skip=True) == ([(1, ("a",), ("O",)), (7, ("d",), ("O",))], {kind: 1})


def test_all_bad_lines_are_found(read):
    with pytest.raises(UserError, match=r"2 bad rows \(2 ragged row\): .*line 2.*line 4"):
        read("a O\nb\n\nc\n")


@pytest.mark.parametrize(
    "data, settings, message",
    [
        ("a\nb\n", {}, "line 1: expected words in column 0 and tags in column -1, found 1 column"),
        ("a O\n", {"word_column": 2}, "line 1: expected words in column 2 and tags in column -1, found 2 columns"),
        ("a O\n", {"tag_column": -3}, "line 1: expected words in column 0 and tags in column -3, found 2 columns"),
        ("a O\n", {"word_column": 2, "tag_column": None}, "line 1: expected words in column 2, found 2 columns"),
        ("\n\n", {}, "expected rows, found none"),
        ("-DOCSTART-\n", {}, "expected rows, found none"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_at_once(read, data, settings, message):
    with pytest.raises(UserError, match=message):
        read(data, skip=True, **settings)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing.conll: no such file"):
        read_conll(tmp_path / "nothing.conll", BadRows())


# -- CoNLL-U ----------------------------------------------------------------------------------------------------------

TREE = """\
# newdoc id = d
# sent_id = s-1
# text = Vámonos al mar
1-2|Vámonos|_|_|_|_|_|_|_|_
1|Vamos|ir|VERB|V0|Mood=Ind|0|root|0:root|_
2|nos|nosotros|PRON|P0|_|1|obj|1:obj|_
2.1|fue|ir|VERB|V0|_|_|_|1:conj|_
3-4|al|_|_|_|_|_|_|_|SpaceAfter=No
3|a|a|ADP|S0|_|5|case|5:case|_
4|el|el|DET|D0|_|5|det|5:det|_
5|mar|mar|NOUN|N0|_|1|obl|1:obl|_

# sent_id = s-2
1|New York|New York|PROPN|N0|_|0|root|_|_

1|_|_|PUNCT|F0|_|0|root|_|_
""".replace("|", "\t")


@pytest.mark.parametrize("name", ["a.conllu", "a.conllu.gz"])
def test_syntactic_words_are_read_without_multiword_tokens_and_empty_nodes(read, name):
    rows, _ = read(TREE, name=name)
    assert rows == [
        (5, ("Vamos", "nos", "a", "el", "mar"), ("VERB", "PRON", "ADP", "DET", "NOUN")),
        (14, ("New York",), ("PROPN",)),
        (16, ("_",), ("PUNCT",)),
    ]


def test_other_columns_can_be_the_tags(read):
    assert read(TREE, name="a.conllu", column="xpos")[0][0][2] == ("V0", "P0", "S0", "D0", "N0")
    assert read(TREE, name="a.conllu", column="feats")[0][0][2] == ("Mood=Ind", "_", "_", "_", "_")
    assert read(TREE, name="a.conllu", column=None)[0][0][2] is None
    with pytest.raises(UserError, match="expected one of the columns lemma, upos, xpos, .*, found 'pos'"):
        read(TREE, name="a.conllu", column="pos")


def test_the_sentence_id_is_kept(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_text(TREE, encoding="utf-8")
    assert [row.id for row in read_conllu(path, BadRows())] == ["s-1", "s-2", ""]


@pytest.mark.parametrize(
    "line, kind, message",
    [
        ("2|b|b|X|X|_|1|dep|_", "ragged row", "expected 10 columns with tabs between them, found 9"),
        ("2 b b X X _ 1 dep _ _", "ragged row", "expected 10 columns with tabs between them, found 1"),
        ("x|b|b|X|X|_|1|dep|_|_", "word number", "expected a number like 1, 1-2 or 1.1, found 'x'"),
        ("1-|b|b|X|X|_|1|dep|_|_", "word number", "found '1-'"),
        ("2||b|X|X|_|1|dep|_|_", "empty text", "expected a word, found none"),
        ("2|b|b|_|X|_|1|dep|_|_", "label", "expected a tag for the word 'b', found none"),
    ],
)
def test_a_bad_conllu_line_is_named_and_its_sentence_left_out(read, line, kind, message):
    word = "1\ta\ta\tX\tX\t_\t0\troot\t_\t_\n"
    data = word + "\n" + word + line.replace("|", "\t") + "\n\n" + word
    with pytest.raises(UserError, match=rf"1 bad row \(1 {kind}\): .*a.conllu, line 4: .*{message}"):
        read(data, name="a.conllu")
    rows, counts = read(data, skip=True, name="a.conllu")
    assert [line for line, _, _ in rows] == [1, 6] and counts == {kind: 1}


# -- the real files ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.exists(), reason="the benchmark's files are not here")
@pytest.mark.parametrize(
    "name, sentences, words",
    [
        ("wnut17train.conll", 3394, 62730),
        ("emerging.dev.conll", 1009, 15733),
        ("emerging.test.annotated", 1287, 23394),
    ],
)
def test_wnut_has_its_official_number_of_sentences(name, sentences, words):
    bad = BadRows("error")
    rows = read_conll(REAL / "ner" / "wnut17" / name, bad)
    assert (len(rows), sum(len(row.words) for row in rows)) == (sentences, words) and not bad.counts
    kinds = ("corporation", "creative-work", "group", "location", "person", "product")
    assert {tag for row in rows for tag in row.tags} <= {"O"} | {f"{p}-{kind}" for p in "BI" for kind in kinds}


@pytest.mark.skipif(not REAL.exists(), reason="the treebank is not here")
@pytest.mark.parametrize("split, sentences, words", [("dev", 2001, 25147), ("test", 2077, 25094)])
def test_the_english_web_treebank_has_its_official_number_of_words(split, sentences, words):
    bad = BadRows("error")
    rows = read_conllu(REAL / "tagging" / "ud_english_ewt" / f"en_ewt-ud-{split}.conllu.gz", bad)
    assert (len(rows), sum(len(row.words) for row in rows)) == (sentences, words) and not bad.counts
    assert len({tag for row in rows for tag in row.tags}) == 17
