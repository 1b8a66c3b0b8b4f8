"""Text -> a prepared corpus: tokenizer, shards of token rows, manifest.

Work goes on in `OUT.partial`, which at the end becomes `OUT` in one rename. `progress.json` there says how far it got;
the same command goes on from it and writes the same bytes as a run that was never stopped.
"""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np

from electrax.config import UserError
from electrax.data.corpus import FORMAT_VERSION, MANIFEST_FILE, Manifest, Shard, Split
from electrax.data.encode import Chunk, Encoded, Part, encode_chunks, pieces, split_long
from electrax.data.outside import read_object
from electrax.data.readers import END, Documents, LineReader, OnBadInput, Source, find_sources
from electrax.data.rows import Layout, PackedRows, SegmentRows, Special, row_dtype
from electrax.data.shards import ShardWriter
from electrax.data.tokenizer import KINDS, Tokenizer, is_kind
from electrax.storage import locked, on_this_machine, sync_directory, write_atomically

MEGABYTE = 1_000_000
CHUNK_CHARACTERS = 1 << 20
SAVE_EVERY = 8  # chunks
PROGRESS_FILE = "progress.json"
# What a tokenizer is trained on, spread evenly over the input. SentencePiece needs 20 bytes of memory a character.
SAMPLE_CHARACTERS = dict(zip(KINDS, (100_000_000, 100_000_000, 20_000_000, 20_000_000), strict=True))
NOT_IN_THE_BYTES = ("out", "workers", "on_bad_input", "beam")  # may differ between a run and the run that resumes it


@dataclass(frozen=True)
class PrepareConfig:
    """Text -> tokenizer + token rows."""

    texts: tuple[str, ...]  # files, folders, globs (.txt, .json, .jsonl; also .gz .xz .zst) or tfds:NAME[/split]
    out: str  # the directory to make
    tokenizer: str = "wordpiece"  # wordpiece, bpe, unigram or sentencepiece-bpe to train one, or a path to load one
    vocab_size: int = 30522  # of a tokenizer to train; a small text may give fewer
    lowercase: bool = True  # for wordpiece and vocab.txt
    strip_accents: bool | None = None  # for wordpiece and vocab.txt; None follows lowercase
    layout: Layout = "packed"  # full rows without loss, or the reference's sentence pairs (a line is a sentence)
    max_length: int = 128  # tokens in a row
    documents: Documents = "blank_line"  # end of a document in plain text: a blank line or the end of the file
    text_field: str = "text"  # of JSON lines and TFDS examples
    holdout: float = 0.01  # share of documents for evaluation, every round(1 / holdout)-th
    valid: tuple[str, ...] = ()  # texts for evaluation instead of a holdout
    workers: int = 0  # processes that encode; 0 takes all cores where it pays, 1 stays in this process
    seed: int = 0  # of the chances in the layout segments
    on_bad_input: OnBadInput = "error"  # stop at broken input, or skip and count it
    max_line_mb: int = 16  # longest line, in MiB
    shard_mb: int = 64  # size of a shard file
    tfds_dir: str | None = None  # where prepared TFDS datasets lie; None is ~/tensorflow_datasets
    beam: str = ""  # options of an Apache Beam pipeline (--runner=…) that does the work instead; see electrax.data.beam

    def __post_init__(self):
        minimum = {"max_length": 5, "vocab_size": 6, "workers": 0, "max_line_mb": 1, "shard_mb": 1}
        for key, least in minimum.items():
            if getattr(self, key) < least:
                raise UserError(f"{key}: expected at least {least}, not {getattr(self, key)}")
        if not 0 <= self.holdout <= 0.5:
            raise UserError(f"holdout: expected a share from 0 to 0.5, not {self.holdout}")
        if not self.texts:
            raise UserError("texts: expected at least one file, folder, glob or tfds:NAME")


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is: `share` of the input's bytes on the disk (0 to 1), and what has come of it."""

    stage: Literal["tokenizer", "rows"]
    share: float
    documents: int
    rows: int
    tokens: int
    text_mb: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """The finished corpus, and the text and seconds of this run's encoding (it may have resumed another's)."""

    manifest: Manifest
    seconds: float
    text_mb: float


@dataclass
class State:
    """All that a resumed run needs; JSON-able."""

    source: int = 0
    items: int = 0
    documents: int = 0
    skipped: dict = field(default_factory=dict)
    carry: dict = field(default_factory=lambda: {"train": None, "valid": None})
    rows: dict = field(default_factory=lambda: {"train": 0, "valid": 0})
    tokens: dict = field(default_factory=lambda: {"train": 0, "valid": 0})
    split_documents: dict = field(default_factory=lambda: {"train": 0, "valid": 0})
    text_bytes: int = 0
    text_tokens: int = 0
    unknown_tokens: int = 0


def prepare(config: PrepareConfig, progress: Callable[[Progress], None] = lambda _: None) -> Report:
    """Make the corpus `config.out`; the number of workers changes no byte of it.

    Wrong input, an existing `out`, an `out.partial` of another command and a full disk are UserErrors. With more than
    one worker call it under `if __name__ == "__main__"`: the workers are spawned.
    """
    if config.beam:
        from electrax.data.beam import prepare_with_beam

        return prepare_with_beam(config, shlex.split(config.beam), progress)
    out, sources = on_this_machine(config.out), check(config)
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(partial, "`prepare`"):
            return _prepare(config, sources, out, partial, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{partial}: the disk is full; make room and run the same command again to go on") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{partial}: cannot write here ({error.strerror})") from None
        raise


def check(config: PrepareConfig) -> list[list[Source]]:
    """The sources of the texts and those of the texts for evaluation; a UserError where the work cannot begin."""
    out = Path(config.out)
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or choose another directory")
    sources = [_find(config, config.texts), _find(config, config.valid)]
    for source in [*sources[0], *sources[1]]:
        if config.on_bad_input == "error" and not source.size():
            raise UserError(f"{source.name}: expected text, found an empty file")
    return sources


def _find(config: PrepareConfig, texts: tuple[str, ...]) -> list[Source]:
    return find_sources(texts, config.documents, config.text_field, config.max_line_mb << 20, config.tfds_dir)


def _prepare(config: PrepareConfig, sources: list[list[Source]], out: Path, partial: Path, progress) -> Report:
    train, all_sources = sources[0], sources[0] + sources[1]
    plan = _plan(config, all_sources)
    state = _resume(partial, plan)
    if state is None:
        progress(Progress("tokenizer", 0.0, 0, 0, 0, 0.0, 0.0))
        with open(make_tokenizer(config, train).save(partial), "rb") as file:
            os.fsync(file.fileno())
        state = State()
        _write_progress(partial, plan, state)
    tokenizer = Tokenizer.load(partial)
    before, start = state.text_bytes, time.monotonic()

    every = 0 if config.valid else _holdout_every(train, config)
    reader = LineReader(all_sources, config.on_bad_input, state.skipped)
    chunks = cut(reader, state, lambda source, number: split_of(source, number, len(train), every))
    row_bytes = config.max_length * row_dtype(tokenizer.vocab_size).itemsize
    shard_rows = rows_in_shard(config, tokenizer)
    writers = {split: ShardWriter(partial, split, row_bytes, shard_rows, rows) for split, rows in state.rows.items()}
    builders = {split: new_builder(config, tokenizer, state.carry[split]) for split in state.rows}
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        encoded_chunks = encode_chunks(partial, chunks, config.workers)
        stack.enter_context(contextlib.closing(encoded_chunks))
        for number, (chunk, encoded) in enumerate(encoded_chunks, 1):
            _add(chunk, encoded, builders, state)
            _take(builders, writers, state, tokenizer.pad_id)
            if number % SAVE_EVERY == 0:
                for writer in writers.values():
                    writer.sync()
                _write_progress(partial, plan, state)
            counts = state.documents, sum(state.rows.values()), sum(state.tokens.values()), state.text_bytes / 1e6
            progress(Progress("rows", chunk.share, *counts, time.monotonic() - start))
        for builder in builders.values():
            builder.finish()
        _take(builders, writers, state, tokenizer.pad_id)
    state.skipped = dict(reader.skipped)
    shards = {split: writer.shards() for split, writer in writers.items()}
    manifest = _finish(out, partial, make_manifest(config, tokenizer, state, shards))
    return Report(manifest, time.monotonic() - start, (state.text_bytes - before) / 1e6)


def _plan(config: PrepareConfig, sources: list[Source]) -> dict:
    """What a resumed run must share with the run it resumes, as JSON gives it back."""
    fingerprints = [source.fingerprint() for source in sources]
    plan = {"format_version": FORMAT_VERSION, "config": _settings(config), "sources": fingerprints}
    return json.loads(json.dumps(plan))


def _settings(config: PrepareConfig) -> dict:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_IN_THE_BYTES}


def _resume(partial: Path, plan: dict) -> State | None:
    """The state of an interrupted run of this plan; None if there is none, or it had no tokenizer yet."""
    path = partial / PROGRESS_FILE
    if not path.exists():
        if any(partial.iterdir()):
            raise UserError(f"{partial}: expected an interrupted run's {PROGRESS_FILE} in it; remove the directory")
        _write_progress(partial, plan, None)
        return None
    saved = read_object(path, sha256=str)
    if saved.pop("sha256") != _sha256(saved):
        raise UserError(f"{path}: damaged; remove the directory {partial} to begin again")
    if saved["state"] is None:  # nothing would be lost
        _write_progress(partial, plan, None)
        return None
    if saved["plan"] != plan:
        old, new = saved["plan"]["config"], plan["config"]
        changed = [key for key in new if old.get(key) != new[key]] or ["the input files"]
        raise UserError(f"{partial}: made by another command ({', '.join(changed)} changed); repeat that command to go "
                        "on, or remove the directory")  # fmt: skip
    return State(**saved["state"])


def _write_progress(partial: Path, plan: dict, state: State | None) -> None:
    content = {"plan": plan, "state": asdict(state) if state else None}
    write_atomically(partial / PROGRESS_FILE, json.dumps({**content, "sha256": _sha256(content)}))


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_tokenizer(config: PrepareConfig, sources: list[Source]) -> Tokenizer:
    """The one that the config names, or a new one of that kind, trained on the sources."""
    if not is_kind(config.tokenizer):
        return Tokenizer.load(config.tokenizer, config.lowercase, config.strip_accents)
    items = LineReader(sources, config.on_bad_input).read()
    lines = (part for _, _, item in items if item is not END for part in split_long(item))
    sample = _sample(lines, SAMPLE_CHARACTERS[config.tokenizer])
    if not sample:
        raise UserError(f"{', '.join(config.texts)}: expected text to train a tokenizer on, found none")
    return Tokenizer.train(config.tokenizer, sample, config.vocab_size, config.lowercase, config.strip_accents)


def _sample(lines: Iterator[str], characters: int, block_size: int = 1 << 16) -> list[str]:
    """Blocks of lines spread evenly over all lines, of about `characters` at most: every block, and whenever that has
    become too many, every second of them.
    """
    kept: list[list[str]] = []
    block, size, number, stride = [], 0, 0, 1
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= block_size:
            if number % stride == 0:
                kept.append(block)
            if len(kept) * block_size > characters:
                kept, stride = kept[::2], stride * 2
            block, size, number = [], 0, number + 1
    return [line for block in [*kept, block] for line in block]


def _holdout_every(sources: list[Source], config: PrepareConfig) -> int:
    """Every how many-th document is for evaluation: in a small corpus only the last, 0 for none."""
    if not config.holdout:
        return 0
    ends = (item for _, _, item in LineReader(sources, config.on_bad_input).read() if item is END)
    return every_of(config, sum(1 for _ in zip(range(round(1 / config.holdout)), ends, strict=False)))


def every_of(config: PrepareConfig, documents: int) -> int:
    """Every how many-th of these documents is for evaluation; those beyond `1 / holdout` make no difference."""
    if not config.holdout:
        return 0
    return min(documents, round(1 / config.holdout)) if documents > 1 else 0


def split_of(source: int, document: int, train_sources: int, every: int) -> str:
    """Where a document goes; `source` and `document` are numbers in the order of the input."""
    return "valid" if source >= train_sources or (every and (document + 1) % every == 0) else "train"


def cut(
    reader: LineReader, state: State, split: Callable[[int, int], str], whole_documents: bool = False
) -> Iterator[Chunk]:
    """Cut the stream of lines, from where `state` is, into chunks of about CHUNK_CHARACTERS, or of as many more as the
    last of `whole_documents` takes."""
    sizes = [source.size() for source in reader.sources]
    source, items, documents = state.source, state.items, state.documents
    lines, parts, part_lines, characters = [], [], 0, 0

    def chunk() -> Chunk:
        share = min(1.0, (sum(sizes[:source]) + reader.position) / max(1, sum(sizes)))
        return Chunk(lines, parts, source, items, documents, dict(reader.skipped), share)

    for source, items, item in reader.read(state.source, state.items):  # noqa: B007 (`chunk` reads `items`)
        if item is END:
            parts.append(Part(split(source, documents), documents, part_lines, True))
            part_lines, documents = 0, documents + 1
        else:
            lines.append(item)
            part_lines, characters = part_lines + 1, characters + len(item)
        if characters >= CHUNK_CHARACTERS and (item is END or not whole_documents):
            if part_lines:
                parts.append(Part(split(source, documents), documents, part_lines, False))
            yield chunk()
            lines, parts, part_lines, characters = [], [], 0, 0
    if parts:
        yield chunk()


def new_builder(config: PrepareConfig, tokenizer: Tokenizer, carry: dict | None) -> PackedRows | SegmentRows:
    """A builder of rows of the config's layout, in the state `carry`."""
    special = Special(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)
    dtype = row_dtype(tokenizer.vocab_size)
    if config.layout == "packed":
        return PackedRows(config.max_length, special, dtype, carry)
    return SegmentRows(config.max_length, special, dtype, config.seed, carry)


def rows_in_shard(config: PrepareConfig, tokenizer: Tokenizer) -> int:
    """How many rows a full shard holds, at least one."""
    return max(1, config.shard_mb * MEGABYTE // (config.max_length * row_dtype(tokenizer.vocab_size).itemsize))


def _add(chunk: Chunk, encoded: Encoded, builders: dict, state: State) -> None:
    """Give a chunk's documents to the builders of their splits, and move the state past the chunk."""
    for part, ids, lengths in pieces(chunk.parts, encoded):
        builders[part.split].add(ids, lengths, part.document, part.ends)
        state.split_documents[part.split] += part.ends
    state.source, state.items, state.documents = chunk.source, chunk.items, chunk.documents
    state.skipped = chunk.skipped
    state.text_bytes += encoded.text_bytes
    state.text_tokens += len(encoded.ids)
    state.unknown_tokens += encoded.unknown


def _take(builders: dict, writers: dict, state: State, pad_id: int) -> None:
    """Write the rows that are complete."""
    for split, builder in builders.items():
        rows = builder.take()
        writers[split].append(rows)
        state.rows[split] += len(rows)
        state.tokens[split] += int(np.count_nonzero(rows != pad_id))
        state.carry[split] = builder.carry()


def make_manifest(
    config: PrepareConfig, tokenizer: Tokenizer, state: State, shards: dict[str, tuple[Shard, ...]]
) -> Manifest:
    """What is written at the end; a UserError where there is nothing to train on."""
    if not state.rows["train"]:
        raise UserError(f"{', '.join(config.texts)}: no rows came of it; expected text with at least one token")
    splits = {
        name: Split(state.rows[name], state.tokens[name], state.split_documents[name], shards[name])
        for name in state.rows
    }
    places = sum(state.rows.values()) * config.max_length
    counts = {
        "text_bytes": state.text_bytes,
        "text_tokens": state.text_tokens,
        "unknown_share": state.unknown_tokens / max(1, state.text_tokens),
        "padding_share": 1 - sum(state.tokens.values()) / places,
        "skipped": dict(sorted(Counter(state.skipped).items())),
    }
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        layout=config.layout,
        max_length=config.max_length,
        dtype=row_dtype(tokenizer.vocab_size).name,
        splits=splits,
        counts=counts,
        config=_settings(config),
    )


def _finish(out: Path, partial: Path, manifest: Manifest) -> Manifest:
    write_atomically(partial / MANIFEST_FILE, manifest.dumps())
    if out.exists():
        raise UserError(f"{out}: appeared while {partial} was being written; remove one of them")
    os.rename(partial, out)
    sync_directory(out.parent)
    (out / PROGRESS_FILE).unlink()
    return manifest
