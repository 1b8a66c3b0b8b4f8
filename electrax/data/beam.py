"""`prepare` shared by many machines: an Apache Beam pipeline that makes the local command's corpus, byte for byte.

Two passes over the texts. The first counts every source's documents; from then on each document's number is known,
and with it its split and its chances. The second encodes chunks of whole documents anywhere in any order, and finds
what each chunk does to the rows by every state it may begin in (`rows.Effect`). One worker chains these small tables in
order. Then every chunk is laid where it belongs, and every shard is written, once, by the worker that gathers its
pieces.

All workers see the texts and `out` under the same names, on a shared file system, and have electrax[beam] installed. A
worker has memory for the longest document and for a shard.
"""

import functools
import hashlib
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from electrax.config import UserError
from electrax.data.corpus import MANIFEST_FILE, Shard
from electrax.data.encode import Chunk, Encoded, Part, encode_lines, pieces
from electrax.data.prepare import (
    PrepareConfig,
    Progress,
    Report,
    State,
    check,
    cut,
    every_of,
    make_manifest,
    make_tokenizer,
    new_builder,
    rows_in_shard,
    split_of,
)
from electrax.data.readers import END, LineReader, Source
from electrax.data.rows import Document, Effect, PackedRows, SegmentRows, row_dtype
from electrax.data.shards import shard_name
from electrax.data.tokenizer import Tokenizer
from electrax.storage import new_directory, on_this_machine, write_atomically

SPLITS = ("train", "valid")
Key = tuple[int, int]  # of a chunk: source, number in it


@dataclass(frozen=True)
class Job:
    """What every worker knows. Of the documents every `every`-th is held out, of the sources those after the first
    `train_sources`; `directory` holds the tokenizer, and gets the shards."""

    config: PrepareConfig
    directory: Path
    train_sources: int
    every: int
    shard_rows: int

    @property
    def scratch(self) -> Path:
        """A directory for what is not part of the corpus."""
        return self.directory / "scratch"

    def builder(self, state: int) -> PackedRows | SegmentRows:
        """One in a state of Effect."""
        new = functools.partial(new_builder, self.config, _tokenizer(self.directory))
        return new(new(None).carry_between(state, self.config.max_length))


@dataclass(frozen=True)
class Texts:
    """An encoded chunk of whole documents."""

    parts: list[Part]
    encoded: Encoded

    def documents(self, split: str) -> Iterator[Document]:
        """Those of a split, in order."""
        for part, ids, lengths in pieces(self.parts, self.encoded):
            if part.split == split:
                yield part.document, ids, lengths


def prepare_with_beam(
    config: PrepareConfig, options: Sequence[str] = (), progress: Callable[[Progress], None] = lambda _: None
) -> Report:
    """Make the corpus `config.out` with a pipeline of these options, as Beam spells them (`--runner=…`).

    The tokenizer is trained here. `out` appears at the end, whole; a run that fails leaves nothing and starts anew.
    UserErrors are those of `prepare`.
    """
    pipeline = functools.partial(_pipeline, options)
    pipeline()  # what is wrong with the options shows before the work begins
    train, valid = check(config)
    sources, start = [*train, *valid], time.monotonic()
    with new_directory(on_this_machine(config.out).absolute()) as directory:
        progress(Progress("tokenizer", 0.0, 0, 0, 0, 0.0, 0.0))
        make_tokenizer(config, train).save(directory)
        tokenizer = Tokenizer.load(directory)
        start = time.monotonic()

        job = Job(config, directory, len(train), 0, rows_in_shard(config, tokenizer))
        job.scratch.mkdir()
        counted = _run(pipeline, job, "counts", lambda begin: _count_all(begin, config, sources))
        documents = [count["documents"] for count in counted]
        every = 0 if config.valid else every_of(config, sum(documents))
        job = Job(config, directory, len(train), every, job.shard_rows)
        firsts = np.cumsum([0, *documents]).tolist()
        numbered = list(zip(range(len(sources)), sources, firsts, strict=False))
        results = _run(pipeline, job, "results", lambda begin: _make_all(begin, job, numbered))

        state = State(skipped=dict(sum((Counter(count["skipped"]) for count in counted), Counter())))
        shards = _add_up(results, state)
        if sum(state.split_documents.values()) != sum(documents):
            raise UserError(f"{', '.join(config.texts + config.valid)}: changed while they were read")
        manifest = make_manifest(config, tokenizer, state, shards)
        for path in job.scratch.iterdir():
            path.unlink()
        job.scratch.rmdir()
        write_atomically(directory / MANIFEST_FILE, manifest.dumps())
    rows, tokens = sum(state.rows.values()), sum(state.tokens.values())
    report = Report(manifest, time.monotonic() - start, state.text_bytes / 1e6)
    progress(Progress("rows", 1.0, sum(documents), rows, tokens, report.text_mb, report.seconds))
    return report


def _pipeline(options: Sequence[str]) -> Any:
    """A Beam pipeline to build on."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("beam: needs other libraries: pip install apache-beam, or uv run --extra beam …") from None
    try:
        return beam.Pipeline(options=PipelineOptions(list(options)))
    except (SystemExit, ValueError) as error:  # argparse's way to refuse
        raise UserError(f"beam: {' '.join(options)!r} are not Beam's options ({error})") from None


def _run(pipeline: Callable[[], Any], job: Job, name: str, build: Callable[[Any], Any]) -> list[dict]:
    """Run what `build` makes of a new pipeline; the dicts that come of it, by way of a file, sorted by their "order".
    The first with an "error" is raised as a UserError."""
    import apache_beam as beam

    path = job.scratch / f"{name}.json"
    with pipeline() as begin:
        results = build(begin) | "One" >> beam.Map(lambda result: (0, result)) | "Gather" >> beam.GroupByKey()
        results | "Keep" >> beam.Map(lambda group: write_atomically(path, json.dumps(list(group[1]))))
    found = sorted(json.loads(path.read_bytes()), key=lambda result: result["order"]) if path.exists() else []
    for error in (result["error"] for result in found if result.get("error")):
        raise UserError(error)
    return found


def _add_up(results: list[dict], state: State) -> dict[str, tuple[Shard, ...]]:
    """Bring into `state` what was made; the shards of each split."""
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for result in results:
        if "shard" in result:
            split, _ = result["order"]
            shards[split].append(Shard(**result["shard"]))
            state.rows[split] += shards[split][-1].rows
            state.tokens[split] += result["tokens"]
        else:
            for split, number in result["documents"].items():
                state.split_documents[split] += number
            state.text_bytes += result["text_bytes"]
            state.text_tokens += result["text_tokens"]
            state.unknown_tokens += result["unknown_tokens"]
    return {split: tuple(some) for split, some in shards.items()}


def _count_all(begin: Any, config: PrepareConfig, sources: list[Source]) -> Any:
    import apache_beam as beam

    numbered = begin | "Sources" >> beam.Create(list(enumerate(sources))) | "Spread" >> beam.Reshuffle()
    return numbered | "Count" >> beam.Map(lambda source: count(config, *source))


def _make_all(begin: Any, job: Job, sources: list[tuple[int, Source, int]]) -> Any:
    import apache_beam as beam

    chunks = (
        begin
        | "Sources" >> beam.Create(sources)
        | "Spread sources" >> beam.Reshuffle()
        | "Read" >> beam.FlatMap(lambda source: read(job, *source))
        | "Spread chunks" >> beam.Reshuffle()
        | "Encode" >> beam.MapTuple(lambda key, chunk: (key, encode(job, chunk)))
    )
    places = (
        chunks
        | "Effects" >> beam.MapTuple(lambda key, texts: (0, (key, effects(job, texts))))
        | "In one place" >> beam.GroupByKey()
        | "Chain" >> beam.FlatMap(lambda group: chain(group[1]))
    )
    written = (
        {"texts": chunks, "places": places}
        | "Chunks and places" >> beam.CoGroupByKey()
        | "Lay" >> beam.FlatMap(lambda group: lay(job, group[1]["texts"][0], group[1]["places"][0]))
        | "Shards" >> beam.GroupByKey()
        | "Write" >> beam.MapTuple(lambda shard, laid: write(job, *shard, laid))
    )
    return (chunks | "Totals" >> beam.MapTuple(lambda _, texts: totals(texts)), written) | beam.Flatten()


def count(config: PrepareConfig, number: int, source: Source) -> dict:
    """How many documents a source has and what was left out of it, or why it is refused."""
    reader = LineReader([source], config.on_bad_input)
    documents, error = 0, ""
    try:
        documents = sum(item is END for _, _, item in reader.read())
    except UserError as refused:
        error = str(refused)
    return {"order": [number], "documents": documents, "skipped": dict(reader.skipped), "error": error}


def read(job: Job, number: int, source: Source, first: int) -> Iterator[tuple[Key, Chunk]]:
    """The chunks of a source whose first document has the number `first`."""
    reader = LineReader([source], job.config.on_bad_input)
    split = lambda _, document: split_of(number, document, job.train_sources, job.every)  # noqa: E731
    chunks = cut(reader, State(documents=first), split, whole_documents=True)
    return (((number, k), chunk) for k, chunk in enumerate(chunks))


def encode(job: Job, chunk: Chunk) -> Texts:
    """The pure work of a chunk; what it gives depends on its lines alone."""
    return Texts(chunk.parts, encode_lines(_tokenizer(job.directory), chunk.lines))


def effects(job: Job, texts: Texts) -> dict[str, Effect]:
    """What a chunk does to the rows of each split."""
    return {split: job.builder(0).effect(texts.documents(split)) for split in SPLITS}


def chain(chunks: Iterable[tuple[Key, dict[str, Effect]]]) -> Iterator[tuple[Key, dict[str, tuple[int, int]]]]:
    """For each chunk, by split: after how many ids of the split it is laid, and in which state."""
    places = dict.fromkeys(SPLITS, (0, 0))
    for key, by_split in sorted(chunks, key=lambda chunk: chunk[0]):
        yield key, places
        places = {
            split: (place + int(by_split[split].added[state]), int(by_split[split].state[state]))
            for split, (place, state) in places.items()
        }


def lay(
    job: Job, texts: Texts, places: dict[str, tuple[int, int]]
) -> Iterator[tuple[tuple[str, int], tuple[int, bytes]]]:
    """A chunk's rows, which may begin and end amid a row: (split, shard) and (place in the shard in ids, bytes)."""
    shard_ids = job.shard_rows * job.config.max_length
    for split, (place, state) in places.items():
        builder = job.builder(state)
        for number, ids, lengths in texts.documents(split):
            builder.add(ids, lengths, number, True)
        laid = builder.take_all()[place % job.config.max_length :]  # what others laid in the row is not ours
        while laid:
            shard, start = divmod(place, shard_ids)
            some = laid[: shard_ids - start]
            yield (split, shard), (start, some.tobytes())
            place, laid = place + len(some), laid[len(some) :]


def write(job: Job, split: str, number: int, laid: Iterable[tuple[int, bytes]]) -> dict:
    """Write a shard of what was laid in it, its last row padded; what the manifest says of it."""
    tokenizer = _tokenizer(job.directory)
    dtype = row_dtype(tokenizer.vocab_size)
    ids = np.frombuffer(b"".join(some for _, some in sorted(laid)), dtype)
    ids = np.pad(ids, (0, -len(ids) % job.config.max_length), constant_values=tokenizer.pad_id)
    name, own = shard_name(split, number), job.scratch / uuid.uuid4().hex  # a shard may be tried twice at once
    try:
        with open(own, "xb") as file:
            file.write(ids.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(own, job.directory / name)
    except OSError as error:
        return {"order": [split, number], "error": f"{job.directory / name}: cannot write ({error.strerror})"}
    shard = Shard(name, len(ids) // job.config.max_length, hashlib.sha256(ids.data).hexdigest())
    tokens = int(np.count_nonzero(ids != tokenizer.pad_id))
    return {"order": [split, number], "shard": asdict(shard), "tokens": tokens}


def totals(texts: Texts) -> dict:
    """A chunk's part in the manifest's counts."""
    return {
        "order": [""],
        "documents": Counter(part.split for part in texts.parts),
        "text_bytes": texts.encoded.text_bytes,
        "text_tokens": len(texts.encoded.ids),
        "unknown_tokens": texts.encoded.unknown,
    }


@functools.lru_cache(1)
def _tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)
