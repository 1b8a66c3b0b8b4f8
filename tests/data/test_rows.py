from array import array

import numpy as np
import pytest

from electrax.data.rows import PackedRows, SegmentRows, Special, row_dtype

PAD, CLS, SEP = 0, 1, 2
SPECIAL = Special(PAD, CLS, SEP)
DTYPE = np.dtype(np.uint16)


def ids(*tokens):
    return array("H", tokens)


def packed(length, documents):
    builder = PackedRows(length, SPECIAL, DTYPE)
    for number, tokens in enumerate(documents):
        builder.add(ids(*tokens), [len(tokens)], number, True)
    builder.finish()
    return builder.take()


def test_row_dtype_is_the_smallest_that_holds_the_vocabulary():
    assert row_dtype(65536) == np.uint16 and row_dtype(65537) == np.uint32


def test_packed_puts_documents_one_after_another_and_pads_the_last_row():
    assert packed(8, [[10, 11], [12]]).tolist() == [[CLS, 10, 11, SEP, CLS, 12, SEP, PAD]]


def test_packed_goes_on_in_the_next_row_with_a_cls_of_its_own():
    assert packed(6, [[10, 11, 12, 13, 14, 15]]).tolist() == [
        [CLS, 10, 11, 12, 13, SEP],
        [CLS, 14, 15, SEP, PAD, PAD],
    ]


def test_packed_uses_three_free_places_and_pads_two():
    assert packed(7, [[10, 11], [12, 13]]).tolist()[0] == [CLS, 10, 11, SEP, CLS, 12, SEP]
    assert packed(6, [[10, 11], [12, 13]]).tolist() == [[CLS, 10, 11, SEP, PAD, PAD], [CLS, 12, 13, SEP, PAD, PAD]]


def test_packed_leaves_out_a_document_without_tokens():
    assert packed(5, [[], [10], []]).tolist() == [[CLS, 10, SEP, PAD, PAD]]
    assert packed(5, [[]]).shape == (0, 5)


def test_packed_loses_no_token_and_pads_at_most_two_a_row():
    random = np.random.default_rng(0)
    documents = [random.integers(3, 1000, random.integers(0, 60)).tolist() for _ in range(200)]
    rows = packed(16, documents)
    assert [t for t in rows.ravel().tolist() if t > SEP] == [t for document in documents for t in document]
    assert ((rows == PAD).sum(1)[:-1] <= 2).all()
    assert ((rows == CLS).sum(1) == (rows == SEP).sum(1)).all() and (rows[:, 0] == CLS).all()


@pytest.mark.parametrize("size", [1, 3, 7])
def test_packed_does_not_depend_on_how_documents_arrive_nor_on_resuming(size):
    documents = [list(range(10, 31)), [], list(range(40, 45)), list(range(50, 61))]
    rows, carry = [], None
    for number, tokens in enumerate(documents):
        for start in range(0, max(1, len(tokens)), size):
            builder = PackedRows(8, SPECIAL, DTYPE, carry)
            some = tokens[start : start + size]
            builder.add(ids(*some), [len(some)], number, start + size >= len(tokens))
            rows += builder.take().tolist()
            carry = builder.carry()
    builder.finish()
    assert rows + builder.take().tolist() == packed(8, documents).tolist()


class Scripted(SegmentRows):
    """Draws its chances from a list."""

    def __init__(self, length, chances):
        super().__init__(length, SPECIAL, DTYPE, seed=0)
        self.chances = list(chances)

    def _chance(self, document):
        return self.chances.pop(0)


def segments(length, chances, *documents):
    """Rows without padding, of documents given as lists of sentences."""
    builder = Scripted(length, chances)
    for number, sentences in enumerate(documents):
        flat = ids(*(t for s in sentences for t in s))
        builder.add(flat, [len(s) for s in sentences], number, True)
    assert builder.chances == [], "not all chances were drawn"
    rows = builder.take()
    assert rows.shape[1] == length
    return [[t for t in row if t != PAD] for row in rows.tolist()]


TWO, ONE = 0.1, 0.0999  # the first draw of an example: two segments, or one (10 %)
FULL, SHORT = 0.05, 0.0499  # the last: the next target is the full length, or short (5 %)
A, B = 0.4999, 0.5  # the coin: the sentence stays in the first segment, or starts the second


def test_segments_splits_at_half_the_target_less_three():
    # (13 - 3) // 2 = 5: [10] + [11, 12, 13] is 4 < 5; one more would be 5, so the coin decides
    rows = segments(13, [TWO, B, FULL], [[10], [11, 12, 13], [14]])
    assert rows == [[CLS, 10, 11, 12, 13, SEP, 14, SEP]]


def test_segments_lets_the_coin_put_one_sentence_over_the_half():
    rows = segments(13, [TWO, A, FULL], [[10], [11, 12, 13], [14, 15], [16]])
    assert rows == [[CLS, 10, 11, 12, 13, 14, 15, SEP, 16, SEP]]  # A is at 6 >= 5 now: no coin for [16]


def test_segments_draws_no_coin_when_the_first_segment_is_full():
    assert segments(13, [TWO, FULL], [[10, 11, 12, 13, 14], [15]]) == [[CLS, 10, 11, 12, 13, 14, SEP, 15, SEP]]


def test_segments_returns_a_short_sentence_to_the_first_segment_after_the_second_began():
    rows = segments(13, [TWO, B, FULL], [[10, 11], [12, 13, 14, 15], [16]])
    assert rows == [[CLS, 10, 11, 16, SEP, 12, 13, 14, 15, SEP]]


def test_segments_gives_one_segment_in_a_tenth_of_the_examples():
    assert segments(13, [ONE, FULL], [[10, 11], [12, 13, 14, 15], [16]]) == [[CLS, *range(10, 17), SEP]]


def test_segments_first_target_of_a_single_segment_is_100000():
    long = [3] * 100_000
    rows = segments(13, [ONE, B, FULL], [[10], long])  # 1 + 100000 is over it: the coin, then the second segment
    assert rows == [[CLS, 10, SEP, *[3] * 9, SEP]]
    rows = segments(13, [ONE, FULL], [[10], long[:99_998]])
    assert rows == [[CLS, 10, *[3] * 10, SEP]]


def test_segments_cuts_both_segments_and_throws_the_overflow_away():
    rows = segments(8, [TWO, FULL, TWO, FULL], [list(range(10, 30)), [30]])
    assert rows == [[CLS, 10, 11, 12, 13, 14, 15, SEP], [CLS, 30, SEP]]
    rows = segments(10, [TWO, B, FULL], [[10], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]])
    assert rows == [[CLS, 10, SEP, 20, 21, 22, 23, 24, 25, SEP]]


def test_segments_ends_an_example_when_the_target_is_reached_without_room_for_special_tokens():
    rows = segments(8, [TWO, B, FULL], [[10], [11], [12, 13, 14, 15], [16], [17]])
    assert rows == [[CLS, 10, SEP, 11, 12, 13, 14, SEP]]  # 8 tokens collected, 5 kept


def test_segments_ends_an_example_at_the_end_of_a_document():
    assert segments(13, [TWO, FULL, TWO, FULL], [[10]], [], [[11]]) == [[CLS, 10, SEP], [CLS, 11, SEP]]


@pytest.mark.parametrize("draw, target", [(0.0, 5), (0.5, 9), (0.9999, 12)])
def test_segments_sometimes_makes_the_next_target_short(draw, target):
    sentences = [[10]] * 12 + [[20]] * 12
    builder = Scripted(12, [ONE, SHORT, draw, ONE, FULL])
    builder.add(ids(*[10] * 12), [1] * 12, 0, False)
    assert builder.carry()["target"] == target
    builder.add(ids(*[20] * target), [1] * target, 0, False)
    first, second = builder.take().tolist()
    assert first == [CLS, *[10] * 10, SEP] and second.count(20) == min(target, 10) and len(sentences) == 24
    assert builder.carry()["target"] == 12


def test_segments_carries_the_short_target_into_the_next_document():
    rows = segments(12, [ONE, SHORT, 0.0, ONE, FULL, ONE, FULL], [[10] * 12], [[20]] * 6)
    assert rows == [[CLS, *[10] * 10, SEP], [CLS, *[20] * 5, SEP], [CLS, 20, SEP]]


def reference_rows(length, seed, documents):
    """Section 2.6 of the reference's behaviour again, in the words of build_pretraining_dataset.py."""
    import hashlib

    target, examples = length, []
    for number, document in enumerate(documents):
        draws = 0

        def chance(number=number):
            nonlocal draws
            draws += 1
            digest = hashlib.blake2b(f"{seed} {number} {draws}".encode(), digest_size=8).digest()
            return (int.from_bytes(digest, "little") >> 11) / 2**53

        sentences = []
        for position, sentence in enumerate(document):
            sentences.append(sentence)
            total = sum(len(s) for s in sentences)
            if total < target and position < len(document) - 1:
                continue
            if not total:
                continue
            first_target = 100000 if chance() < 0.1 else (target - 3) // 2
            a, b = [], []
            for s in sentences:
                if (
                    len(a) == 0
                    or len(a) + len(s) < first_target
                    or (len(b) == 0 and len(a) < first_target and chance() < 0.5)
                ):
                    a += s
                else:
                    b += s
            a = a[: length - 2]
            b = b[: max(0, length - len(a) - 3)]
            row = [CLS] + a + [SEP] + (b + [SEP] if b else [])
            examples.append(row + [PAD] * (length - len(row)))
            sentences = []
            target = 5 + int(chance() * (length - 4)) if chance() < 0.05 else length
    return examples


def random_documents(count):
    random = np.random.default_rng(1)
    return [
        [random.integers(3, 999, random.integers(0, 12)).tolist() for _ in range(random.integers(1, 15))]
        for _ in range(count)
    ]


def test_segments_equals_an_independent_reading_of_the_reference():
    documents = random_documents(150)
    builder = SegmentRows(24, SPECIAL, DTYPE, seed=5)
    for number, sentences in enumerate(documents):
        builder.add(ids(*sum(sentences, [])), [len(s) for s in sentences], number, True)
    assert builder.take().tolist() == reference_rows(24, 5, documents)


def test_segments_does_not_depend_on_how_sentences_arrive_nor_on_resuming():
    documents = random_documents(40)
    whole, rows, carry = SegmentRows(24, SPECIAL, DTYPE, seed=5), [], None
    for number, sentences in enumerate(documents):
        whole.add(ids(*sum(sentences, [])), [len(s) for s in sentences], number, True)
        for position, sentence in enumerate(sentences):
            builder = SegmentRows(24, SPECIAL, DTYPE, 5, carry)
            builder.add(ids(*sentence), [len(sentence)], number, position == len(sentences) - 1)
            rows += builder.take().tolist()
            carry = builder.carry()
    assert rows == whole.take().tolist()


def test_segments_shares_are_a_tenth_single_and_a_twentieth_short():
    builder = SegmentRows(32, SPECIAL, DTYPE, seed=0)
    targets = []
    for number in range(3000):
        builder.add(ids(*[9] * 40), [1] * 40, number, True)
        targets.append(builder.carry()["target"])
    rows = builder.take()
    full = rows[(rows != PAD).sum(1) == 32]
    single = ((full == SEP).sum(1) == 1).mean()
    assert abs(single - 0.1) < 0.02
    assert abs(np.mean(np.array(targets) < 32) - 0.05 * 27 / 28) < 0.015
