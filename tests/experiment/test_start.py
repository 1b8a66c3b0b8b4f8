"""The weights that a run takes from another model."""

import pathlib
import re

import jax
import numpy as np
import pytest

from electrax.config import UserError, build, merge
from electrax.data.tokenizer import Tokenizer
from electrax.experiment import finetune, pretrain
from electrax.experiment.config import PretrainConfig
from electrax.experiment.run import load_params
from electrax.experiment.saved import ConvertConfig, convert
from electrax.experiment.start import start_weights
from tests.fixtures.finetuning import PRETRAINED, REVIEWS, finetuning, make_pretrained, write_rows

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_pretrained(tmp_path_factory.mktemp("start") / "source")


def numpy(tree):
    return jax.tree.map(np.array, tree)


def start(source, tokenizer: Tokenizer | None = None, **changes):
    """(the drawn weights, those of a run that starts from `source`)."""
    config = build(
        PretrainConfig, merge(merge(PRETRAINED, {"workdir": "w", "init_from": str(source)}), changes), "test"
    )
    tokenizer = tokenizer or Tokenizer.load(source)
    task = pretrain.make_task(config, tokenizer.vocab_size, tokenizer.special_ids, None)
    drawn = task.init(jax.random.key(1), {"ids": np.full((1, 8), 5)})
    return numpy(drawn), numpy(start_weights(config, tokenizer, drawn))


def vocabulary(folder: pathlib.Path, *pieces: str) -> Tokenizer:
    (folder / "vocab.txt").write_text("\n".join(pieces))
    return Tokenizer.load(folder / "vocab.txt")


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_every_weight_is_taken_where_nothing_differs(source):
    _, taken = start(source)
    before, size = numpy(load_params(source)[1]), Tokenizer.load(source).vocab_size
    for tree in (taken, before):  # what lies beyond the vocabulary is never looked at
        tree["embeddings"]["word"] = tree["embeddings"]["word"][:size]
        tree["generator"]["head"]["output_bias"] = tree["generator"]["head"]["output_bias"][:size]
    assert same(taken, before)


def test_a_token_keeps_its_row_by_its_name_and_a_new_one_is_drawn(source, tmp_path, caplog):
    known = Tokenizer.load(source)
    pieces = known.pieces(range(known.vocab_size))
    changed = vocabulary(tmp_path, *reversed(pieces[5:]), "zebra", *WORDS)
    drawn, taken = start(source, changed)
    before = numpy(load_params(source)[1])
    for piece in (pieces[9], "[MASK]"):
        here, there = changed.pieces(range(changed.vocab_size)).index(piece), pieces.index(piece)
        assert np.array_equal(taken["embeddings"]["word"][here], before["embeddings"]["word"][there])
        assert taken["generator"]["head"]["output_bias"][here] == before["generator"]["head"]["output_bias"][there]
    zebra = len(pieces) - 5
    assert np.array_equal(taken["embeddings"]["word"][zebra], drawn["embeddings"]["word"][zebra])
    assert same(taken["discriminator"], before["discriminator"])
    assert caplog.messages == [f"init_from {source}: 1 of {len(pieces) + 1} tokens are new to it"]


def test_of_a_smaller_vocabulary_every_token_keeps_its_row(source, tmp_path):
    known = Tokenizer.load(source)
    pieces = known.pieces(range(known.vocab_size))
    changed = vocabulary(tmp_path, *WORDS, *pieces[20:40])
    _, taken = start(source, changed)
    word, before = taken["embeddings"]["word"], numpy(load_params(source)[1])["embeddings"]["word"]
    assert np.array_equal(word[5:25], before[20:40]) and np.array_equal(word[4], before[known.mask_id])
    assert changed.vocab_size == 25 and len(word) == 128


def test_a_pretraining_goes_on_from_a_hugging_face_pair_with_a_fresh_optimizer_from_step_0(source, tmp_path):
    convert(ConvertConfig(source=str(source), out=str(tmp_path / "pair")))
    assert sorted(path.name for path in (tmp_path / "pair").iterdir() if path.is_dir()) == [
        "discriminator",
        "generator",
    ]
    values = {"workdir": str(tmp_path / "run"), "init_from": str(tmp_path / "pair")}
    data = {"path": str(source.parent / "pretraining.txt"), "tokenizer": str(source)}
    run = pretrain.set_up(build(PretrainConfig, merge(merge(PRETRAINED, values), {"data": data}), "test"))
    assert (run.start, int(run.state.step)) == (0, 0)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(run.state.opt_state))
    size, found, before = run.tokenizer.vocab_size, numpy(run.state.params), numpy(load_params(source)[1])
    for tree in (found, before):
        tree["embeddings"]["word"] = tree["embeddings"]["word"][:size]
        tree["generator"]["head"]["output_bias"] = tree["generator"]["head"]["output_bias"][:size]
    assert same(found, before)


def test_positions_are_cut_or_drawn_beyond_the_known_ones(source):
    before = numpy(load_params(source)[1])["embeddings"]["position"]
    _, shorter = start(source, model={"max_length": 16})
    assert np.array_equal(shorter["embeddings"]["position"], before[:16])
    drawn, longer = start(source, model={"max_length": 130})
    assert np.array_equal(longer["embeddings"]["position"][:128], before)
    assert np.array_equal(longer["embeddings"]["position"][128:], drawn["embeddings"]["position"][128:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"width": 32}}, "model.width is 16, this run's 32"),
        ({"model": {"layers": 2}, "generator": {"layers": 1}}, "model.layers is 1, this run's 2"),
        ({"model": {"body": "modern"}}, "model.body is electra, this run's modern"),
        ({"generator": {"width": 16}}, "generator.width is 8, this run's 16"),
    ],
)
def test_another_shape_is_said_by_its_key(source, changes, message):
    with pytest.raises(UserError, match=f"^{re.escape(f'init_from {source}: its {message}')}$"):
        start(source, **changes)


def test_the_encoder_of_a_masked_lm_becomes_the_discriminators_and_the_other_way_round(source, tmp_path, caplog):
    alone = make_pretrained(tmp_path / "mlm", objective={"kind": "mlm"}, generator={"width": 0, "heads": 0})
    before = numpy(load_params(alone)[1])
    drawn, taken = start(alone)
    assert same(taken["discriminator"]["encoder"], before["generator"]["encoder"])
    assert same(taken["generator"], drawn["generator"])
    assert "the discriminator's head and the generator it does not have, drawn anew" in caplog.messages[-1]
    drawn, taken = start(source, objective={"kind": "mlm"}, generator={"width": 0, "heads": 0})
    assert same(taken["generator"]["encoder"], numpy(load_params(source)[1])["discriminator"]["encoder"])
    assert same(taken["generator"]["head"], drawn["generator"]["head"])


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def test_a_fine_tuning_takes_another_vocabulary_by_names_and_more_positions_as_drawn(source, tmp_path):
    known = Tokenizer.load(source)
    pieces = known.pieces(range(known.vocab_size))
    vocabulary(tmp_path, *WORDS, *reversed(pieces[5:]), "zebra")
    write_rows(tmp_path / "rows.csv", REVIEWS)
    data = {"path": str(tmp_path / "rows.csv"), "tokenizer": str(tmp_path / "vocab.txt"), "max_length": 130}
    config = finetuning(tmp_path / "run", init_from=str(source), steps=1, data=data)
    run, rows = finetune.set_up(config)
    found, before = numpy(run.state.params), numpy(load_params(source)[1])
    words, word = found["embeddings"]["word"], before["embeddings"]["word"]
    assert np.array_equal(words[5], word[len(pieces) - 1]) and np.array_equal(words[: len(WORDS)], word[: len(WORDS)])
    positions = found["embeddings"]["position"]
    assert np.array_equal(positions[:128], before["embeddings"]["position"])
    assert positions.shape[0] == 130 and positions[128:].std() > 0
    assert same(found["discriminator"]["encoder"], before["discriminator"]["encoder"])
    assert f"1 of {len(pieces) + 1} tokens are new to the weights" in rows.notes
    assert run.tokenizer.pieces([len(pieces)]) == ["zebra"]
