"""One tiny model of every kind that can be exported, and rows for it."""

import jax
import numpy as np

from electrax.convert.model import Model
from electrax.data.tokenizer import Tokenizer
from electrax.inference.classifier import Classifier
from electrax.inference.model import PretrainedModel
from electrax.inference.reader import Reader
from electrax.inference.tagger import Tagger
from electrax.inference.template import TemplateClassifier
from electrax.models.encoder import EncoderConfig
from electrax.tasks.answer import AnswerTask
from electrax.tasks.classify import ClassifyTask
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds
from electrax.tasks.tag import TagTask
from electrax.tasks.template import TemplateTask
from tests.fixtures.weights import random_params

LINES = ["the cat sat on the mat", "a dog ran under the red mat", "big cats, small dogs and one blue hat"] * 20
MAX_LENGTH = 24
SHAPES = ((1, 24), (3, 7), (2, 16))  # rows and tokens; of 24 tokens is the longest row, and of 7 less than BEAM
BEAM = 8


def make_tokenizer():
    return Tokenizer.train("wordpiece", LINES, 80)


def make_model(kind, tokenizer, **changes):
    """Two layers whose embeddings are narrower; `changes` are those of its encoder."""
    shape = {"layers": 2, "width": 32, "heads": 2, "feed_forward": 48, "embedding_width": 16, "max_length": MAX_LENGTH}
    encoder = EncoderConfig(tokenizer.vocab_size, **{**shape, **changes})
    if kind in ("rtd", "mlm"):
        return _pretrained(kind, tokenizer, encoder)
    ids = tokenizer.pad_id, tokenizer.sep_id
    match kind:
        case "classes":
            model, task = Classifier, ClassifyTask(encoder, *ids, classes=("bad", "fair", "good"), style="linear")
        case "number":
            model, task = Classifier, ClassifyTask(encoder, *ids, kind="number", scale=5.0, style="dense")
        case "choice":
            model, task = Classifier, ClassifyTask(encoder, *ids, kind="choice", style="pooled")
        case "template":
            model, task = _template_classifier, TemplateTask(encoder, *ids, classes=("bad", "good"))
        case "tags":
            model, task = Tagger, TagTask(encoder, *ids, tags=("A", "B", "C", "D"), max_length=MAX_LENGTH)
        case "joint" | "plain":
            model, task = Reader, AnswerTask(encoder, *ids, style=kind, beam=BEAM, no_answer=True)
    example = {"ids": np.zeros((1, 2, 8) if kind == "choice" else (1, 8), np.int32)}
    params = random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), example)))
    return model(params, tokenizer, task, MAX_LENGTH)


def _template_classifier(params, tokenizer, task, max_length):
    return TemplateClassifier(params, tokenizer, task, max_length, ("mat", "hat"), "{text} a {label}")


def _pretrained(kind, tokenizer, encoder):
    special = SpecialIds(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    task = PretrainTask(ObjectiveConfig(kind=kind), encoder, encoder, special, "packed", True)
    params = random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), {"ids": np.zeros((1, 8), np.int32)})))
    return PretrainedModel(params, tokenizer, encoder, encoder if kind == "rtd" else None, MAX_LENGTH)


def make_rows(tokenizer, rows, length):
    """Pairs of texts, int32; all but the first row end in padding."""
    ids = np.random.RandomState(0).randint(5, tokenizer.vocab_size, (rows, length)).astype(np.int32)
    ids[:, 0], ids[:, 2] = tokenizer.cls_id, tokenizer.sep_id
    for row in range(rows):
        ids[row, length - 1 - row :] = tokenizer.pad_id
        ids[row, length - 1 - row] = tokenizer.sep_id
    return ids


def expected(model, ids):
    """The outputs by the model's own functions, with types 0 for a pretrained one."""
    params, pad_id = model.params, model.tokenizer.pad_id
    match model:
        case PretrainedModel(discriminator=None):
            found = {"hidden": model._encode(params, ids, pad_id), "vocabulary": model._fill(params, ids, pad_id)}
            found["vocabulary"] = found["vocabulary"][..., : model.tokenizer.vocab_size]
        case PretrainedModel():
            found = {"hidden": model._encode(params, ids, pad_id), "replaced": model._detect(params, ids, pad_id)}
        case TemplateClassifier():
            # each place as if it were the word of a class
            every = np.repeat(ids[:, None], ids.shape[1], axis=1)
            spans = np.broadcast_to(np.eye(ids.shape[1], dtype=np.int32), every.shape)
            prepared = {"ids": every, "spans": spans}
            found = {"replaced": -jax.jit(lambda prepared: model.task.logits(params, prepared))(prepared)}
        case Classifier():
            found = {"logits": model._forward(params, ids)}
        case Tagger():
            found = {"logits": jax.jit(lambda ids: model.task.logits(params, {"ids": ids}))(ids)}
        case Reader():
            found = jax.jit(lambda ids: _spans(model.task, params, ids))(ids)
    return {name: np.asarray(values) for name, values in found.items()}


def _spans(task, params, ids):
    logits = task.head().apply({"params": params["head"]}, task.hidden(params, ids), task._mask(ids))._asdict()
    if task.style == "plain":
        return logits
    beams = task.beams(params, ids)
    return {
        "start": logits["start"],
        "null": logits["null"],
        **{f"beam_{name}": beams[name] for name in ("start", "end", "score")},
    }


def assert_same(found, wanted, atol, rtol=0.0):
    """Beams beyond what a row allows are in no order: places are compared where the score counts."""
    assert found.keys() == wanted.keys()
    within = None
    if "beam_score" in wanted:
        within = wanted["beam_score"] > -500.0
        assert within.any() and (found["beam_score"][~within] < -500.0).all()
    for name, values in wanted.items():
        counts = {"beam_score": within, "beam_end": within, "beam_start": within.any(-1)} if within is not None else {}
        at = counts.get(name, np.ones(values.shape, bool))
        assert found[name].shape == values.shape and found[name].dtype.kind == values.dtype.kind, name
        np.testing.assert_allclose(found[name][at], values[at], atol=atol, rtol=rtol, err_msg=name)


def make_tower(tokenizer, **changes):
    """The encoder of the directories below."""
    shape = {"layers": 2, "width": 8, "heads": 2, "feed_forward": 12, "embedding_width": 6, "max_length": 16}
    return EncoderConfig(tokenizer.vocab_size, **{**shape, **changes})


def make_pair(tokenizer):
    """What a pretraining leaves; the generator is narrower and shares the embeddings."""
    discriminator, generator = make_tower(tokenizer), make_tower(tokenizer, width=4, feed_forward=10)
    special = SpecialIds(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    task = PretrainTask(ObjectiveConfig(), discriminator, generator, special, "packed", True)
    return Model(_params_of(task, {"ids": np.zeros((1, 8), np.int32)}), discriminator, generator)


def make_classifier(tokenizer, head, **changes):
    """A fine-tuned model of the task classify; `changes` are those of its encoder."""
    encoder = make_tower(tokenizer, **changes)
    task = ClassifyTask(
        encoder, tokenizer.pad_id, tokenizer.sep_id, kind=head.kind, classes=head.classes, style=head.style
    )
    ids = np.zeros((1, 2, 8) if head.kind == "choice" else (1, 8), np.int32)
    return Model(_params_of(task, {"ids": ids}), encoder, head=head)


def _params_of(task, example):
    return random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), example)))
