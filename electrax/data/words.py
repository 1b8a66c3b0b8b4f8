"""Sentences given as words, as token rows in which the first piece of a word stands for the word."""

from collections.abc import Sequence

import numpy as np

from electrax.config import UserError
from electrax.data.encoded import TokenRows
from electrax.data.tokenizer import Tokenizer


def word_padding(pad_id: int) -> dict[str, int]:
    """What fills up the token arrays of these rows."""
    return {"ids": pad_id, "word": -1, "label": -1}


def encode_words(tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], max_length: int) -> TokenRows:
    """Rows `[CLS] pieces [SEP]` of at most `max_length` tokens, those of a sentence one after the other.

    The token array `word` has a word's number in its sentence at its first piece, -1 elsewhere; the field `sentence`
    is the row's sentence. A sentence too long for one row is cut into several, the next of which begins in the last
    half of the one before. Every word counts in one of them alone (is -1 in the others): of the words that two rows
    share, the first half counts in the earlier row, so that each has the more context.

    A word of which nothing is left is the unknown token, one that is longer than a row is cut to it, and a sentence
    without words has no row. Raises UserError where max_length leaves no room for a word.
    """
    room = max_length - 2
    if room < 1:
        raise UserError(f"max_length: expected at least 3, for [CLS], a word and [SEP], not {max_length}")
    pieces = _pieces(tokenizer, sentences, room)
    ids, word, sentence = [], [], []
    for number, words in enumerate(sentences):
        split = [pieces[w] for w in words]
        for start, end, first, last in _windows([len(p) for p in split], room):
            row, marks = [tokenizer.cls_id], [-1]
            for place in range(start, end):
                row += split[place]
                marks.append(place if first <= place < last else -1)
                marks += [-1] * (len(split[place]) - 1)
            ids.append([*row, tokenizer.sep_id])
            word.append([*marks, -1])
            sentence.append(number)
    return TokenRows.of(ids, {"word": word}).with_fields(sentence=np.array(sentence, np.int32))


def with_labels(rows: TokenRows, labels: Sequence[Sequence[int]]) -> TokenRows:
    """Those rows with the token array `label`: a word's label at its first piece, -1 elsewhere.

    `labels` has one for each word of each sentence.
    """
    starts = np.cumsum([0, *map(len, labels)])
    flat = np.fromiter((label for sentence in labels for label in sentence), np.int32, starts[-1])
    word = rows.tokens["word"]
    places = starts[np.repeat(rows.fields["sentence"], np.diff(rows.starts))] + word
    label = np.full(len(word), -1, np.int32)
    label[word >= 0] = flat[places[word >= 0]]
    return TokenRows(rows.starts, {**rows.tokens, "label": label}, rows.fields, rows.group)


def _pieces(tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], most: int) -> dict[str, list[int]]:
    """The ids of each distinct word, at least one and at most `most`.

    A space goes first because byte-level BPE writes a word in a text with it; the other kinds ignore it.
    """
    distinct = list(dict.fromkeys(word for words in sentences for word in words))
    encoded = tokenizer.encode_batch([f" {word}" for word in distinct]) if distinct else []
    return {word: ids[:most] or [tokenizer.unk_id] for word, ids in zip(distinct, encoded, strict=True)}


def _windows(sizes: Sequence[int], room: int) -> list[tuple[int, int, int, int]]:
    """(start, end, first, last) of each row of a sentence whose words have that many pieces: it holds the words
    start … end - 1, of which first … last - 1 count."""
    if not sizes:
        return []
    ends = np.cumsum(sizes)
    starts = ends - sizes
    windows, start = [], 0
    while True:
        end = int(np.searchsorted(ends, starts[start] + room, "right"))
        windows.append((start, end))
        if end == len(sizes):
            break
        # in the last half of this row, and late enough that the next word fits as well
        start = int(np.searchsorted(starts, max(ends[end - 1] - room // 2, ends[end] - room)))
    shared = [(start + end) // 2 for (_, end), (start, _) in zip(windows, windows[1:], strict=False)]
    bounds = [0, *shared, len(sizes)]
    return [(*window, *own) for window, own in zip(windows, zip(bounds, bounds[1:], strict=False), strict=True)]
