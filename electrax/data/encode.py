"""Chunks of lines -> token ids, in worker processes, in order."""

import itertools
import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

from electrax.config import UserError
from electrax.data.rows import new_array, row_dtype
from electrax.data.tokenizer import Tokenizer

# The libraries need about 100 bytes of memory for a character they are at work on.
BATCH = 1 << 21
PART = 1 << 16
FEW = 4  # chunks of a megabyte, each encoded in about 0.3 s; a worker starts in two


class Encoded(NamedTuple):
    """The ids of a chunk's lines one after another, the length of each line, and counts."""

    ids: array
    lengths: list[int]
    unknown: int
    text_bytes: int


@dataclass(frozen=True)
class Part:
    """Some lines of one document."""

    split: str
    document: int
    lines: int
    ends: bool


@dataclass(frozen=True)
class Chunk:
    """Lines to encode, the documents they belong to, and the state of reading after them."""

    lines: list[str]
    parts: list[Part]
    source: int
    items: int
    documents: int
    skipped: dict
    share: float


def pieces(parts: list[Part], encoded: Encoded) -> Iterator[tuple[Part, array, list[int]]]:
    """Each part of an encoded chunk with its ids and how many of them each of its lines has."""
    line = token = 0
    for part in parts:
        lengths = encoded.lengths[line : line + part.lines]
        end = token + sum(lengths)
        yield part, encoded.ids[token:end], lengths
        line, token = line + part.lines, end


def split_long(line: str) -> list[str]:
    """The line in parts of at most PART characters, cut before a space where there is one."""
    parts = []
    while len(line) > PART:
        cut = line.rfind(" ", 1, PART)
        cut = cut if cut > 0 else PART
        parts.append(line[:cut])
        line = line[cut:]
    return [*parts, line]


def encode_lines(tokenizer: Tokenizer, lines: list[str]) -> Encoded:
    """Encode without special tokens; the ids have the dtype of the corpus's rows."""
    ids = new_array(row_dtype(tokenizer.vocab_size))
    lengths = [0] * len(lines)
    for numbers, parts in _batches(lines):
        for number, part_ids in zip(numbers, tokenizer.encode_batch(parts), strict=True):
            ids.extend(array(ids.typecode, part_ids))
            lengths[number] += len(part_ids)
    text_bytes = sum(len(line.encode()) + 1 for line in lines)
    return Encoded(ids, lengths, ids.count(tokenizer.unk_id), text_bytes)


def _batches(lines: list[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Line numbers and parts of lines, about BATCH characters at a time."""
    numbers, parts, size = [], [], 0
    for number, line in enumerate(lines):
        for part in split_long(line):
            numbers.append(number)
            parts.append(part)
            size += len(part)
            if size >= BATCH:
                yield numbers, parts
                numbers, parts, size = [], [], 0
    yield numbers, parts


def encode_chunks(directory: Path, chunks: Iterator[Chunk], workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with its ids, in order, with a bounded number of chunks in flight.

    `directory` holds the tokenizer. One worker means this process, several mean that many spawned ones, 0 one for each
    core, or this process for a text that it has encoded before they would have started.
    """
    if workers == 0:
        first = list(itertools.islice(chunks, FEW + 1))
        chunks, workers = itertools.chain(first, chunks), cores() if len(first) > FEW else 1
    if workers == 1:
        tokenizer = Tokenizer.load(directory)
        for chunk in chunks:
            yield chunk, encode_lines(tokenizer, chunk.lines)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(str(directory),))
    pending: deque = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(_encode, chunk.lines)))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?); run the same command again to go on, perhaps with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_tokenizer: Tokenizer  # of a worker process


def _start_worker(directory: str) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _tokenizer = Tokenizer.load(directory)


def _encode(lines: list[str]) -> Encoded:
    return encode_lines(_tokenizer, lines)


def _exit_with_parent() -> None:
    """A pool's workers would wait forever for a parent that was killed."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
