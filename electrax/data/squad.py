"""Questions on a context: SQuAD's JSON (1.1 and 2.0) and MRQA's JSON lines."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from electrax.config import UserError
from electrax.data.examples import (
    Answer,
    BadRow,
    BadRows,
    Fault,
    QuestionExample,
    collect,
    read_json,
    read_lines,
    short,
    text_fault,
)
from electrax.data.outside import parse_json


@dataclass(frozen=True)
class BadQuestion(BadRow):
    """`id` as it is written, where it is a text or a whole number."""

    id: str | int | None = None


def read_squad(path: str | os.PathLike, bad: BadRows) -> list[QuestionExample]:
    """SQuAD 1.1 or 2.0 (.json, perhaps compressed). A file whose questions have no "answers" is a test set."""
    return collect(iter_squad(path), bad, path)


def iter_squad(path: str | os.PathLike, answers: bool = True) -> Iterator[QuestionExample | BadQuestion]:
    """The questions in order; without `answers` they are those of a test set, whatever answers the file has.

    A file that is not JSON or does not hold questions as SQuAD does is a UserError.
    """
    return _unique(_squad_questions(os.fspath(path), answers))


def read_mrqa(path: str | os.PathLike, bad: BadRows) -> list[QuestionExample]:
    """MRQA 2019 (.jsonl, perhaps compressed): every detected span is an answer, as it is written in the context.

    The context keeps its [TLE], [DOC] and [PAR] marks.
    """
    return collect(_unique(_mrqa_questions(os.fspath(path))), bad, path)


def _unique(items: Iterator[QuestionExample | BadRow]) -> Iterator[QuestionExample | BadRow]:
    seen: set[str] = set()
    for item in items:
        if isinstance(item, QuestionExample):
            if item.id in seen:
                message = "expected an id of its own, found one that was used before"
                item = BadQuestion(item.where, "duplicate id", message, item.id)
            else:
                seen.add(item.id)
        yield item


def _question(where: str, qa: dict[str, Any], id_field: str, context: str) -> QuestionExample | Fault:
    """The question without answers."""
    id, question, impossible = qa.get(id_field), qa.get("question"), qa.get("is_impossible", False)
    if fault := text_fault(id, repr(id_field)) or text_fault(question, "'question'"):
        return fault
    if not isinstance(impossible, bool):
        return Fault("answer", f"expected true or false in 'is_impossible', found {short(impossible)}")
    return QuestionExample(where, id, question, context, (), impossible)


# -- SQuAD -------------------------------------------------------------------------------------------------------------


def _squad_questions(path: str, answers: bool) -> Iterator[QuestionExample | BadQuestion]:
    for a, article in enumerate(_objects(read_json(path), "data", path), 1):
        place = f"{path}, article {a}"
        for p, paragraph in enumerate(_objects(article, "paragraphs", place), 1):
            place = f"{path}, article {a}, paragraph {p}"
            for q, qa in enumerate(_objects(paragraph, "qas", place), 1):
                id = _written_id(qa.get("id"))
                where = f"{place}, question {q}" if id is None else f"{path}, question {id}"
                made = _squad_question(where, qa, paragraph.get("context"), answers)
                yield BadQuestion(where, *made, id) if isinstance(made, Fault) else made


def _written_id(id: Any) -> str | int | None:
    return id if type(id) is int or text_fault(id, "'id'") is None else None


def _objects(holder: Any, key: str, where: str) -> list[dict[str, Any]]:
    items = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{where}: expected SQuAD's format, an object with a list of objects in {key!r}")
    return items


def _squad_question(where: str, qa: dict[str, Any], context: Any, answers: bool) -> QuestionExample | Fault:
    if fault := text_fault(context, "'context'"):
        return fault
    if not answers:
        qa = {key: qa.get(key) for key in ("id", "question")}
    example = _question(where, qa, "id", context)
    if isinstance(example, Fault) or "answers" not in qa:
        return example
    written = qa["answers"]
    if not isinstance(written, list) or bool(written) == example.impossible:
        expected = "no answers to an impossible question" if example.impossible else "a list of answers"
        return Fault("answer", f"expected {expected}, found {short(written)}")
    found = [squad_answer(answer, context) for answer in written]
    fault = next((answer for answer in found if isinstance(answer, Fault)), None)
    return fault or QuestionExample(
        where, example.id, example.question, context, tuple(found), impossible=example.impossible
    )


def squad_answer(answer: Any, context: str) -> Answer | Fault:
    """Of a {"text": …, "answer_start": …}."""
    text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
    if not isinstance(text, str) or not text.strip() or type(start) is not int:
        return Fault("answer", f"expected an answer with 'text' and 'answer_start', found {short(answer)}")
    found = context[max(start, 0) : max(start, 0) + len(text)]
    if start < 0 or found != text:
        return Fault("answer", f"expected the answer {short(text)} at character {start}, found {short(found)}")
    return Answer(text, start)


# -- MRQA --------------------------------------------------------------------------------------------------------------


def _mrqa_questions(path: str) -> Iterator[QuestionExample | BadRow]:
    for line in read_lines(path):
        where = f"{path}, line {line.number}"
        record = line.fault or _mrqa_record(line.text)
        if isinstance(record, Fault):
            if line.number == 1:
                raise UserError(f"{where}: {record.message}")
            yield BadRow(where, *record)
            continue
        for qa in record.get("qas", ()):
            place = f"{where}, question {qa['qid']}" if qa.get("qid") else where
            made = _mrqa_question(place, qa, record["context"])
            yield BadRow(place, *made) if isinstance(made, Fault) else made


def _mrqa_record(text: str) -> dict[str, Any] | Fault:
    """A context with its questions; without any where the line is blank or the header."""
    if not text.strip():
        return {}
    try:
        record = parse_json(text)
    except ValueError as error:
        return Fault("JSON", f"expected one JSON object a line ({error})")
    if isinstance(record, dict) and "header" in record:
        return {}
    questions = record.get("qas") if isinstance(record, dict) else None
    if not isinstance(questions, list) or not all(isinstance(qa, dict) for qa in questions):
        return Fault("JSON", f"expected an object with 'context' and a list of objects in 'qas', found {short(text)}")
    return text_fault(record.get("context"), "'context'") or record


def _mrqa_question(where: str, qa: dict[str, Any], context: str) -> QuestionExample | Fault:
    example = _question(where, qa, "qid", context)
    if isinstance(example, Fault) or "detected_answers" not in qa:
        return example
    try:
        spans = [
            (answer["text"], start, end + 1)  # the file counts the last character in
            for answer in qa["detected_answers"]
            for start, end in answer["char_spans"]
        ]
        texts = [text for text, _, _ in spans] + list(qa.get("answers", ()))
        places = [place for _, *both in spans for place in both]
        well_formed = all(isinstance(text, str) for text in texts) and all(type(place) is int for place in places)
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed or bool(spans) == example.impossible:
        found = short(qa["detected_answers"])
        return Fault("answer", f"expected a list of answers with 'text' and 'char_spans', found {found}")
    for text, start, end in spans:
        if start < 0 or not _letters(text) or _letters(context[start:end]) != _letters(text):
            found = short(context[max(start, 0) : max(end, 0)])
            return Fault("answer", f"expected the answer {short(text)} at character {start}, found {found}")
    answers = tuple(Answer(context[start:end], start) for _, start, end in spans)
    golds = tuple(qa.get("answers", ()))  # what the task's official script compares with, and not the places
    return QuestionExample(where, example.id, example.question, context, answers, example.impossible, golds)


def _letters(text: str) -> str:
    """What answers found by heuristics have in common with the context: neither case, spaces nor punctuation."""
    return "".join(filter(str.isalnum, text.casefold()))
