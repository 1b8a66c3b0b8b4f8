"""Texts with each label word in a template, as rows whose label tokens are marked."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from electrax.config import UserError
from electrax.data.encoded import _shares
from electrax.data.tokenizer import Tokenizer

FIELD = re.compile(r"\{(\w*)\}")
TEXTS, LABEL = ("text", "text2"), "label"  # what the fields of a template are called


class _Filled(NamedTuple):
    """The tokens of a filled template, which of them are the label's, and the places of those of each text."""

    ids: Int[np.ndarray, " T"]
    label: Bool[np.ndarray, " T"]
    texts: list[np.ndarray]

    def without(self, count: int) -> "_Filled":
        """Without so many tokens from the ends of the texts; of two the longer one loses first."""
        sizes = [len(places) for places in self.texts]
        keep = np.ones(len(self.ids), bool)
        for places, size in zip(self.texts, _shares(sizes, sum(sizes) - count), strict=True):
            keep[places[size:]] = False
        return _Filled(self.ids[keep], self.label[keep], [])


def check_template(template: str, words: Sequence[str]) -> None:
    """Raises UserError unless `template` has {text} and {label} once, at most a {text2} besides, and `words` are two
    or more, all different."""
    fields = sorted(FIELD.findall(template))
    if fields not in (sorted((*TEXTS[:1], LABEL)), sorted((*TEXTS, LABEL))):
        raise UserError(f"template: expected {{text}} and {{label}} once, and {{text2}} for pairs, not {template!r}")
    if len(words) < 2:
        raise UserError(f"labels: expected at least two, not {len(words)}")
    for place, word in enumerate(words):
        if not word.strip():
            raise UserError(f"labels: label {place + 1} is empty; expected a word")
        if word in words[:place]:
            raise UserError(f"labels: {word!r} stands for two of them; expected a word of its own for each")


def fill_templates(
    tokenizer: Tokenizer, rows: Sequence[tuple[str, ...]], words: Sequence[str], template: str, max_length: int
) -> tuple[list[list[int]], list[list[int]], Bool[np.ndarray, " N"]]:
    """(ids, spans, cut): each of the N rows with each word as `[CLS] filled template [SEP]`, those of a row side by
    side; 1 for each token of the word, 0 for the others; and which rows lost tokens.

    Where a row is longer than `max_length` its texts are cut, the same for every word, and never the template. Raises
    UserError as `check_template`, for rows of another number of texts, and where no token of a text would be left.
    """
    check_template(template, words)
    parts = FIELD.split(template)  # literal, field, literal, … literal
    count = len(parts[1::2]) - 1
    ids, spans, cut = [], [], np.zeros(len(rows), bool)
    for number, row in enumerate(rows):
        if len(row) != count:
            raise UserError(f"template {template!r} takes texts: {count}, but row {number + 1} has {len(row)}")
        values = dict(zip(TEXTS, row, strict=False))
        filled = [_fill(tokenizer, parts, values | {LABEL: word}) for word in words]
        excess = max(len(each.ids) for each in filled) + 2 - max_length
        cut[number] = excess > 0
        for word, each in zip(words, filled, strict=True):
            if not each.label.any():
                raise UserError(f"labels: the tokenizer finds no token in {word!r}")
            if excess > 0:
                if sum(map(len, each.texts)) <= excess:
                    raise UserError(f"template {template!r} with {word!r} leaves no text of {max_length} tokens")
                each = each.without(excess)
            ids.append([tokenizer.cls_id, *each.ids.tolist(), tokenizer.sep_id])
            spans.append([0, *each.label.astype(int).tolist(), 0])
    return ids, spans, cut


def _fill(tokenizer: Tokenizer, parts: list[str], values: Mapping[str, str]) -> _Filled:
    """A token belongs to the label if it has a character of it, and to a text if all its characters are in it."""
    whole, where = parts[0], {}
    for name, literal in zip(parts[1::2], parts[2::2], strict=True):
        where[name] = (len(whole), len(whole) + len(values[name]))
        whole += values[name] + literal
    ids, offsets = tokenizer.encode(whole)
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    start, end = where[LABEL]
    label = (starts < end) & (ends > start)
    texts = [np.flatnonzero((starts >= where[name][0]) & (ends <= where[name][1]) & ~label)
             for name in TEXTS if name in where]  # fmt: skip
    return _Filled(np.array(ids, np.int64), label, texts)
