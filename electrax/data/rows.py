"""Token ids -> rows of fixed length. Builders take documents piece by piece and carry a little JSON-able state."""

import hashlib
from array import array
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, Shaped

Layout = Literal["packed", "segments"]
Document = tuple[int, array, list[int]]  # number, ids, how many of them each line has


class Special(NamedTuple):
    """The ids a row is built with."""

    pad: int
    cls: int
    sep: int


class Effect(NamedTuple):
    """What some whole documents do to a builder, by the state 0, …, L - 1 that those before them leave it in: how many
    ids they add, and the state they leave. A new builder is in state 0.

    A state is the number of places taken in a packed row, and how much shorter than a row the next pair will be.
    """

    added: Int64[np.ndarray, " L"]
    state: Int64[np.ndarray, " L"]


def row_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def new_array(dtype: np.dtype, ids=()) -> array:
    """A Python array of `dtype`: grows cheaply, unlike numpy's."""
    return array("H" if dtype == np.uint16 else "I", ids)


class _Builder:
    """Collects `_out`, a flat sequence of ids; each full `length` of it is a row."""

    def __init__(self, length: int, special: Special, dtype: np.dtype, out=()):
        self.length, self.special, self.dtype = length, special, dtype
        self._out = new_array(dtype, out)

    def take(self) -> Shaped[np.ndarray, "N L"]:
        """The rows that are complete, which the builder then forgets."""
        full = len(self._out) // self.length * self.length
        rows = np.frombuffer(self._out[:full].tobytes(), self.dtype).reshape(-1, self.length)
        self._out = self._out[full:]
        return rows

    def take_all(self) -> array:
        """All ids, those of a row that is not complete as well, which the builder then forgets."""
        out, self._out = self._out, new_array(self.dtype)
        return out

    def _pad_row(self) -> None:
        self._out.extend([self.special.pad] * (-len(self._out) % self.length))


class PackedRows(_Builder):
    """Rows of `[CLS] piece [SEP] [CLS] piece [SEP] … [PAD]*` that lose no token.

    A document that crosses the end of a row goes on in the next as `[CLS] rest [SEP]`. Fewer than 3 free places are
    padded: they hold no piece. `length` must be at least 3.
    """

    def __init__(self, length: int, special: Special, dtype: np.dtype, carry: dict | None = None):
        super().__init__(length, special, dtype, carry["row"] if carry else ())
        self._open = bool(carry and carry["open"])  # the last piece still lacks its [SEP]

    def carry(self) -> dict:
        """The state after `take`, to build on later."""
        return {"row": self._out.tolist(), "open": self._open}

    @staticmethod
    def carry_between(state: int, length: int) -> dict:
        """The carry, but for the ids of the row, between two documents in a state of Effect."""
        return {"row": [0] * state, "open": False}

    def effect(self, documents: Iterable[Document]) -> Effect:
        """What `add` would do, from their lengths alone."""
        start = np.arange(self.length)
        end = start.copy()
        for _, ids, _ in documents:
            if len(ids):
                free = -end % self.length
                end += np.where(free < 3, free, 0)
                first = np.minimum(len(ids), self.length - end % self.length - 2)
                full, rest = np.divmod(len(ids) - first, self.length - 2)
                end += first + 2 + full * self.length + np.where(rest > 0, rest + 2, 0)
        return Effect(end - start, end % self.length)

    def add(self, ids: array, lengths: list[int], document: int, ends: bool) -> None:
        """More tokens of the current document; `ends` closes it. `lengths` and `document` are not used here."""
        out, length, start = self._out, self.length, 0
        while start < len(ids):
            if not self._open:
                if -len(out) % length < 3:
                    self._pad_row()
                out.append(self.special.cls)
                self._open = True
            room = length - len(out) % length - 1
            piece = ids[start : start + room]
            out.extend(piece)
            start += len(piece)
            if len(piece) == room:
                self._close()
        if ends and self._open:
            self._close()

    def finish(self) -> None:
        """Pad the last row; the builder must not be used again, but for `take`."""
        self._pad_row()

    def _close(self) -> None:
        self._out.append(self.special.sep)
        self._open = False


class SegmentRows(_Builder):
    """The reference's sentence-pair rows, `[CLS] A [SEP] (B [SEP]) [PAD]*` (build_pretraining_dataset.py).

    A line is a sentence. What does not fit is thrown away, and a sentence may return to A after B has begun: both are
    the reference's behaviour. Chance is a function of (seed, document, number of the draw). `length` is at least 5.
    """

    def __init__(self, length: int, special: Special, dtype: np.dtype, seed: int, carry: dict | None = None):
        carry = carry or {"sentences": [], "target": length, "draws": 0}
        super().__init__(length, special, dtype)
        self.seed = seed
        self._sentences = [new_array(dtype, s) for s in carry["sentences"]]
        self._target, self._draws = carry["target"], carry["draws"]
        self._collected = sum(map(len, self._sentences))

    def carry(self) -> dict:
        """The state after `take`, to build on later; fewer than `length` tokens."""
        return {"sentences": [s.tolist() for s in self._sentences], "target": self._target, "draws": self._draws}

    @staticmethod
    def carry_between(state: int, length: int) -> dict:
        """The carry between two documents in a state of Effect."""
        return {"sentences": [], "target": length - state, "draws": 0}

    def effect(self, documents: Iterable[Document]) -> Effect:
        """What `add` would do. Ways through a document soon meet, and then are one."""
        rows, targets = np.zeros(self.length, np.int64), self.length - np.arange(self.length)
        for document in documents:
            known: dict = {}
            before, place = np.unique(targets, return_inverse=True)
            found = np.array([self._follow(document, int(target), known) for target in before])[place]
            rows, targets = rows + found[:, 0], found[:, 1]
        return Effect(rows * self.length, self.length - targets)

    def _follow(self, document: Document, target: int, known: dict) -> tuple[int, int]:
        """How many rows a document makes and the target it leaves; `known` keeps both by (sentence, draws, target)."""
        (number, ids, lengths), passed = document, []
        sentence, draws, start = 0, 0, 0
        while sentence < len(lengths) and (sentence, draws, target) not in known:
            passed.append((sentence, draws, target))
            carry = {"sentences": [], "target": target, "draws": draws}
            builder = SegmentRows(self.length, self.special, self.dtype, self.seed, carry)
            while sentence < len(lengths) and not builder._out:
                end = start + lengths[sentence]
                builder.add(ids[start:end], [end - start], number, sentence + 1 == len(lengths))
                sentence, start = sentence + 1, end
            draws, target = builder._draws, builder._target
            passed[-1] += (bool(builder._out),)
        rows, target = known.get((sentence, draws, target), (0, target))
        for *place, made in reversed(passed):
            rows += made
            known[tuple(place)] = rows, target
        return rows, target

    def add(self, ids: array, lengths: list[int], document: int, ends: bool) -> None:
        """More sentences, of `lengths` tokens, of document number `document`; `ends` closes it."""
        start = 0
        for length in lengths:
            self._sentences.append(ids[start : start + length])
            start, self._collected = start + length, self._collected + length
            if self._collected >= self._target:
                self._example(document)
        if ends:
            if self._collected:
                self._example(document)
            self._sentences, self._draws = [], 0

    def finish(self) -> None:
        """Nothing is left over: the last document has ended."""

    def _example(self, document: int) -> None:
        single = self._chance(document) < 0.1
        first, second = self._split(100_000 if single else (self._target - 3) // 2, document)
        first = first[: self.length - 2]
        second = second[: max(0, self.length - len(first) - 3)]
        self._out.append(self.special.cls)
        self._out.extend(first)
        self._out.append(self.special.sep)
        if second:
            self._out.extend(second)
            self._out.append(self.special.sep)
        self._pad_row()
        self._sentences, self._collected, self._target = [], 0, self.length
        if self._chance(document) < 0.05:
            self._target = 5 + int(self._chance(document) * (self.length - 4))

    def _split(self, first_target: int, document: int) -> tuple[array, array]:
        first, second = new_array(self.dtype), new_array(self.dtype)
        for sentence in self._sentences:
            fits = not first or len(first) + len(sentence) < first_target
            if fits or (not second and len(first) < first_target and self._chance(document) < 0.5):
                first.extend(sentence)
            else:
                second.extend(sentence)
        return first, second

    def _chance(self, document: int) -> float:
        """Uniform in [0, 1)."""
        self._draws += 1
        digest = hashlib.blake2b(f"{self.seed} {document} {self._draws}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53
