"""Lines or rows in, JSON lines out in the same order, as they come."""

import dataclasses
import io
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from electrax.config import UserError
from electrax.data.compressed import COMPRESSED
from electrax.data.conll import iter_conll, iter_conllu
from electrax.data.examples import BadRow, Fault, QuestionExample, TaggedExample, TextExample, decode_lines, text_fault
from electrax.data.squad import BadQuestion, iter_squad
from electrax.data.tables import iter_table, iter_words
from electrax.inference.classifier import Classifier
from electrax.inference.reader import Reader
from electrax.inference.rewriter import Reranker, Rewriter
from electrax.inference.tagger import Tagger
from electrax.tasks.tags import to_spans

ROWS = 1024  # read and predicted together
TOGETHER = 0.02  # seconds within which lines of standard input belong together
LINES, SQUAD = (tuple(kind + suffix for suffix in ("", *COMPRESSED)) for kind in (".txt", ".json"))

Row = TextExample | TaggedExample | QuestionExample | BadRow
Model = Classifier | Tagger | Reader | Rewriter


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """INPUT is a file with a text a line (.txt, or - for standard input; a tab between the texts of a pair, or between
    question and context) or a table (.csv, .tsv, .jsonl, .parquet); of a question answerer also a SQuAD file (.json),
    of a tagger one with a word a line (.conll, words in the first column, or .conllu)."""

    model: str  # the work directory of a fine-tuning
    input: str
    text: tuple[str, ...] = ()  # columns of a table; default: as in training; question and context
    n_best: int = 1  # outputs of each text, of a model that writes texts, or answers of each question
    reranker: str = ""  # of a model that writes texts; a pretrained one that puts the most original outputs first
    compute_dtype: Literal["", "float32", "bfloat16"] = ""  # of matrix products; default: as in training
    batch_tokens: int = 0  # of a large batch; fewer need less memory; 0: chosen for the device


def predict_lines(
    model: Model, config: PredictConfig, columns: tuple[str, ...], reranker: Reranker | None = None
) -> Iterator[str]:
    """One JSON object a row, in order. A row that cannot be read gives {"error": …}, a question of SQuAD's with
    its "id", and the rest go on. `columns` are those of a table, if the config names none."""
    if not isinstance(model, Rewriter) and reranker:
        raise UserError("reranker is for a model that writes texts")
    if not isinstance(model, Rewriter | Reader) and config.n_best != 1:
        raise UserError("n_best is for a model that writes texts or answers questions")
    if config.n_best < 1:
        raise UserError(f"n_best must be at least 1, not {config.n_best}")
    predict = _predictor(model, config, reranker)
    _check_columns(model, config.text)
    rows = _rows(model, config.input, config.text or columns)
    for some in gathered(rows, ROWS, config.input):
        found = iter(predict([row for row in some if not isinstance(row, BadRow)]))
        for row in some:
            result = _error(row) if isinstance(row, BadRow) else next(found)
            yield json.dumps(result, ensure_ascii=False)


def _check_columns(model: Model, named: tuple[str, ...]) -> None:
    count = model.texts if isinstance(model, Classifier) else None if isinstance(model, Reader) else 1
    if named and count is not None and len(named) != count:
        what = "the column of one text" if count == 1 else "the columns of a pair of texts"
        raise UserError(f"text: expected {what}, as in training, found {', '.join(named)}")


def gathered(rows: Iterable[Row], most: int, source: str) -> Iterator[list[Row]]:
    """The rows in lists of `most`, of standard input in shorter ones where no more have come yet. Where reading them
    fails, those before come first."""
    return _arrived(rows, most) if source == "-" else _listed(rows, most)


def _arrived(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    """Reads in a thread of its own, as nothing else can wait for a line and say whether there is one."""
    arrived: queue.Queue[Row | BaseException | None] = queue.Queue(most)

    def read() -> None:
        try:
            for row in rows:
                arrived.put(row)
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        some = [arrived.get()]
        time.sleep(TOGETHER)
        some += [arrived.get() for _ in range(min(arrived.qsize(), most - 1))]
        last = some[-1]
        ended = last is None or isinstance(last, BaseException)
        if found := some[:-1] if ended else some:
            yield found
        if isinstance(last, BaseException):
            raise last
        if ended:
            return


def _listed(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    some: list[Row] = []
    try:
        for row in rows:
            some.append(row)
            if len(some) == most:
                yield some
                some = []
    except UserError:
        if some:
            yield some
        raise
    if some:
        yield some


def _rows(model: Model, source: str, columns: tuple[str, ...]) -> Iterator[Row]:
    if isinstance(model, Reader) and len(columns) != 2:
        raise UserError(f"text: expected the columns of question and context, found {', '.join(columns)}")
    if isinstance(model, Reader) and source.endswith(SQUAD):
        return iter(list(iter_squad(source, answers=False)))  # what is wrong with the file as a whole comes first
    if source == "-" or source.endswith(LINES):
        rows = (row if isinstance(row, BadRow) else _texts(row, len(columns)) for row in read_texts(source))
    elif isinstance(model, Tagger):
        if source.endswith((".conll", ".conllu")):
            return iter_conll(source, tag_column=None) if source.endswith(".conll") else iter_conllu(source, None)
        return iter_words(source, columns[0])
    else:
        rows = iter_table(source, columns)
    return (_read_by(model, row) if isinstance(row, TextExample) else row for row in rows)


def _error(row: BadRow) -> dict[str, Any]:
    known = {"id": row.id} if isinstance(row, BadQuestion) and row.id is not None else {}
    return {**known, "error": f"{row.where}: {row.message}"}


def read_texts(source: str) -> Iterator[TextExample | BadRow]:
    """A text a line, of a .txt file or - for standard input."""
    if source != "-" and not source.endswith(LINES):
        raise UserError(f"{source}: expected a .txt file with a text a line, or - for standard input")
    return _standard_input() if source == "-" else iter_table(source, ("text",))


def _standard_input() -> Iterator[TextExample | BadRow]:
    binary = sys.stdin.buffer
    # a buffer of its own: Python aborts when it ends while a thread waits in the one of sys.stdin
    file = io.BufferedReader(binary.raw) if isinstance(binary, io.BufferedReader) else binary
    for line in decode_lines(file):
        text, where = line.text.rstrip("\r\n"), f"standard input, line {line.number}"
        fault = line.fault or text_fault(text, "the line")
        yield BadRow(where, *fault) if fault else TextExample(where, (text,), None)
    if file is not binary:
        file.detach()  # which leaves sys.stdin open


def _texts(row: TextExample, count: int) -> TextExample | BadRow:
    """The texts of a line, which is one text whatever tabs there are in it where `count` is 1."""
    texts = tuple(row.texts[0].split("\t")) if count > 1 else row.texts
    if len(texts) != count or not all(text.strip() for text in texts):
        return BadRow(row.where, "texts", f"expected {count} texts with a tab between them, found {len(texts)}")
    return dataclasses.replace(row, texts=texts)


def _read_by(model: Model, row: TextExample) -> Row:
    """A row as the kind of example that the model reads."""
    match model:
        case Tagger():
            return TaggedExample(row.where, tuple(row.texts[0].split()), None)
        case Reader():
            question, context = row.texts
            return QuestionExample(row.where, row.id or row.where, question, context, ())
    return row


def _predictor(
    model: Model, config: PredictConfig, reranker: Reranker | None
) -> Callable[[Sequence[Any]], Iterable[dict[str, Any]]]:
    match model:
        case Classifier():
            return lambda rows: model.predict([row.texts for row in rows]) if rows else []
        case Tagger():
            return lambda rows: _tag(model, [row.words for row in rows]) if rows else []
        case Reader():
            return lambda rows: _answer(model, rows, config.n_best)
        case Rewriter():
            return lambda rows: _rewrite(model, [row.texts[0] for row in rows], config.n_best, reranker)
    raise UserError("predict: expected a fine-tuned model; a pretrained one can encode, detect and fill from Python")


def _tag(model: Tagger, sentences: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    for words in model.tag_batch(sentences):
        result: dict[str, Any] = {
            name: [getattr(word, name) for word in words] for name in ("word", "tag", "probability")
        }
        if model.task.scheme:
            spans = to_spans([word.tag for word in words])
            result["entities"] = [span._asdict() for span in spans]
        yield result


def _rewrite(model: Rewriter, texts: list[str], n_best: int, reranker: Reranker | None) -> Iterator[dict[str, Any]]:
    beams = max(model.task.beams, n_best)
    # a re-ranker chooses among all beams
    for found in model.candidates(texts, beams if reranker else n_best, beams, reranker):
        best = {"output": found[0].text, "score": found[0].score}
        yield best | ({"candidates": [each._asdict() for each in found[:n_best]]} if n_best > 1 else {})


def _answer(model: Reader, rows: Sequence[QuestionExample], n_best: int) -> Iterator[dict[str, Any]]:
    found = model.answers(((row.id, row.question, row.context) for row in rows), n_best)
    for row, (id, answer) in zip(rows, found, strict=True):
        if isinstance(answer, Fault):
            yield _error(BadQuestion(row.where, *answer, id if id != row.where else None))
        else:
            best = {"id": id, **answer._asdict()}
            candidates = [candidate._asdict() for candidate in best.pop("candidates")]
            yield best | ({"candidates": candidates} if n_best > 1 else {})
