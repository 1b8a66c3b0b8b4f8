"""A pretraining run: its config, its corpus, its objective."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from electrax.config import UserError
from electrax.data.corpus import MANIFEST_FILE, Corpus, sample_path
from electrax.data.prepare import PrepareConfig, Progress, prepare
from electrax.data.rows import row_dtype
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import PretrainConfig, computed_in, read_config
from electrax.experiment.plan import Plan, plan_mesh, plan_run
from electrax.experiment.run import Run, assemble, check_dropout, keep_config, load_params, mesh_for
from electrax.experiment.start import start_weights, with_generator_shape
from electrax.models.sizes import discriminator_shape, generator_shape
from electrax.storage import on_this_machine, path_of
from electrax.tasks.corruption import slot_count
from electrax.tasks.pretrain import PretrainTask, SpecialIds
from electrax.training.evaluate import make_evaluate
from electrax.training.feed import Feed, fits_device, host_feed, resident_feed
from electrax.training.processes import agreed, together
from electrax.training.state import choose_together
from electrax.training.tracking import Record

# entered around a preparation, gives what `prepare` reports its progress to
Watcher = contextlib.AbstractContextManager[Callable[[Progress], None]]
QUIET: Watcher = contextlib.nullcontext(lambda _: None)
ALONE = ("masked", "causal", "hybrid")  # kinds of generators that are language models without a discriminator, too


def open_corpus(config: PretrainConfig, progress: Watcher) -> tuple[PretrainConfig, Corpus]:
    """The rows that `data.path` names, prepared first where it names text, and the config with what they are."""
    data = config.data
    if not data.path:
        raise UserError('data.path is empty; it names a prepared directory, a text, or "sample" for the bundled books')
    path = path_of(data.path)
    if agreed(lambda: not (path / MANIFEST_FILE).is_file()):
        texts = str(sample_path()) if data.path == "sample" else data.path
        path = on_this_machine(config.workdir, "text that is not prepared") / "data"
        options = {f.name: getattr(data, f.name) for f in dataclasses.fields(data) if f.name != "path"}
        wanted = PrepareConfig(texts=(texts,), out=str(path), seed=config.seed, **options)
        agreed(_prepare_once, wanted, progress)
        corpus = Corpus.open(path)
        check_prepared(wanted, corpus)
    else:
        corpus = Corpus.open(path)
    corpus.verify()
    manifest = corpus.manifest
    for split in ("train", "valid"):
        if not corpus.size(split):
            raise UserError(f"{path}: the split {split} has no rows; prepare more text or a larger --holdout")
    kept = dataclasses.replace(
        data, vocab_size=manifest.vocab_size, layout=manifest.layout, max_length=manifest.max_length
    )
    return dataclasses.replace(config, data=kept), corpus


def _prepare_once(wanted: PrepareConfig, progress: Watcher) -> None:
    if not (pathlib.Path(wanted.out) / MANIFEST_FILE).is_file():
        pathlib.Path(wanted.out).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with progress as report:
            prepare(wanted, report)


def check_prepared(wanted: PrepareConfig, corpus: Corpus) -> None:
    """Raises UserError where the rows kept in a work directory were made with other settings than these."""
    made, manifest = corpus.manifest.config, corpus.manifest
    for key in ("tokenizer", "vocab_size", "lowercase", "layout", "max_length", "holdout"):
        # config.toml has the vocabulary's real size, which may be smaller than the one asked for
        if getattr(wanted, key) not in (made.get(key), getattr(manifest, key, made.get(key))):
            raise UserError(
                f"{corpus.directory} was prepared with data.{key} = {made.get(key)!r}, now {getattr(wanted, key)!r}; "
                "take another workdir, or remove that directory"
            )
    texts = made.get("texts")
    source = str(texts[0]) if isinstance(texts, list) and texts else ""
    if pathlib.Path(wanted.texts[0]).name != pathlib.Path(source).name:
        raise UserError(
            f"{corpus.directory} was prepared from {source}, not from {wanted.texts[0]}; "
            "take another workdir, or remove that directory"
        )


def make_task(
    config: PretrainConfig, vocab_size: int, special_ids: dict[str, int], corpus: Corpus | None
) -> PretrainTask:
    """The objective over a vocabulary. Without a corpus it can do everything but read batches."""
    if config.data.max_length > config.model.max_length:
        raise UserError(
            f"model.max_length is {config.model.max_length}, but the rows have {config.data.max_length} tokens"
        )
    if not slot_count(config.data.max_length, config.objective.mask_prob):
        raise UserError(
            f"objective.mask_prob {config.objective.mask_prob} of data.max_length {config.data.max_length} tokens "
            "leaves no position to predict"
        )
    objective, kind = config.objective, config.generator.kind
    if objective.kind == "electric" and kind != "two_tower":
        why = "as it sees no text behind" if kind == "causal" else "as it sees that token"
        raise UserError(
            f'objective.kind "electric" predicts every token from the text around it, which generator.kind "{kind}" '
            f'cannot, {why}; set generator.kind "two_tower"'
        )
    if objective.kind == "electric" and not 0 < objective.mask_prob < 1:
        raise UserError(
            f'objective.mask_prob must lie above 0 and below 1 for objective.kind "electric", not {objective.mask_prob}'
        )
    if objective.kind == "mlm" and kind not in ALONE:
        raise UserError(
            f'objective.kind "mlm" trains one LM alone, of generator.kind {" or ".join(ALONE)}, not "{kind}"'
        )
    discriminator = discriminator_shape(config.model, vocab_size)
    is_alone = objective.kind == "mlm"
    generator = discriminator if is_alone else generator_shape(config.model, config.generator, discriminator)
    return PretrainTask(
        objective=config.objective,
        discriminator=discriminator,
        generator=generator,
        special=SpecialIds(**{role: special_ids[role] for role in ("pad", "cls", "sep", "mask")}),
        layout=config.data.layout,
        shared_embeddings=is_alone or config.generator.embeddings == "shared",
        generator_kind=kind,
        faithful=config.faithful,
        corpus=corpus,
        batch_size=config.batch_size,
        eval_rows=config.eval.rows,
        seed=config.seed,
    )


def plan(config: PretrainConfig) -> Plan:
    """What the run would need; text that is not prepared counts as its config says, and nothing is written."""
    mesh, imagined = plan_mesh(config)
    config = with_generator_shape(config)
    if (path_of(config.data.path) / MANIFEST_FILE).is_file():
        config, corpus = open_corpus(config, QUIET)
        vocabulary, special = corpus.manifest.vocab_size, corpus.manifest.special_ids
    else:
        corpus, vocabulary = None, config.data.vocab_size
        special = {role: number for number, role in enumerate(("pad", "unk", "cls", "sep", "mask"))}
    task = make_task(config, vocabulary, special, corpus)
    example = {"ids": np.zeros((config.batch_size, config.data.max_length), row_dtype(vocabulary))}
    return plan_run(config, task, example, mesh, config.steps or 1, imagined)


def set_up(config: PretrainConfig, progress: Watcher = QUIET, early: bool = False) -> Run:
    """Prepares what is not there yet and checks that everything fits, before step 0; `early` as in assemble."""
    with together():
        mesh, config = mesh_for(config), with_generator_shape(config)
        check_dropout(config)
        config, corpus = open_corpus(config, progress)
        tokenizer = corpus.tokenizer()
        steps = config.steps or math.ceil(config.epochs * corpus.size("train") / config.batch_size)
        task = make_task(config, tokenizer.vocab_size, tokenizer.special_ids, corpus)
    keep_config(config, tokenizer, config.data.path, steps)
    flops = task.flops(config.batch_size, config.data.max_length)
    return assemble(
        config,
        task,
        tokenizer,
        mesh,
        example={"ids": corpus.rows("train", np.zeros(config.batch_size, np.int64))},
        steps=steps,
        flops_per_step=flops,
        tokens_per_step=float(config.batch_size * config.data.max_length),
        eval_every=config.eval.every,
        save_every=config.checkpoint.every,
        steps_per_dispatch=choose_together(
            config.steps_per_dispatch,
            (config.log.every, config.eval.every, config.checkpoint.every),
            mesh.local_devices[0],
            flops / mesh.size,
        ),
        feed=make_feed(config, task, corpus, mesh),
        initial=lambda drawn: start_weights(config, tokenizer, drawn),
        early=early,
    )


def make_feed(config: PretrainConfig, task: PretrainTask, corpus: Corpus, mesh: Mesh) -> Feed:
    """From the devices' memory where the config or the rows' size says so, otherwise from the disk."""
    manifest = corpus.manifest
    size = corpus.size("train") * manifest.max_length * np.dtype(manifest.dtype).itemsize
    fits = fits_device(size, mesh.local_devices[0])
    if config.rows_on_device == "never" or (config.rows_on_device == "auto" and not fits):
        return host_feed(task.train_batch, task.batch_size, mesh)
    return resident_feed(
        corpus.rows("train", np.arange(corpus.size("train"))), task.train_numbers, task.batch_size, mesh
    )


def evaluate_newest(config: PretrainConfig) -> tuple[PretrainTask, Tokenizer, Record]:
    """The newest whole checkpoint of a run on the held-out rows that `data` names."""
    config = computed_in(config, None)
    mesh, path, own = mesh_for(config), config.data.path, path_of(config.workdir) / "data"
    is_own = path == read_config(config.workdir).data.path and (own / MANIFEST_FILE).is_file()
    if not is_own and not (path_of(path) / MANIFEST_FILE).is_file():
        raise UserError(
            f"data.path {path}: expected a directory that electrax prepare wrote with the model's tokenizer"
        )
    config, corpus = open_corpus(config, QUIET)
    tokenizer = corpus.tokenizer()
    if Tokenizer.load(config.workdir).sha256 != tokenizer.sha256:
        raise UserError(f"{config.data.path}: prepared with another tokenizer than the model in {config.workdir}")
    task = make_task(config, tokenizer.vocab_size, tokenizer.special_ids, corpus)
    step, params = load_params(config.workdir, mesh)
    return task, tokenizer, Record(step, "eval", *make_evaluate(task, mesh)(params))
