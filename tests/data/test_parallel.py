"""Two files line by line, and batches of pairs."""

import numpy as np
import pytest

from electrax.config import UserError
from electrax.data.examples import BadRows
from electrax.data.parallel import PairBatches, read_parallel


def files(tmp_path, source: str, target: str):
    (tmp_path / "a.en").write_text(source)
    (tmp_path / "a.de").write_text(target)
    return tmp_path / "a.en", tmp_path / "a.de"


def test_line_n_of_one_file_belongs_to_line_n_of_the_other(tmp_path):
    found = read_parallel(*files(tmp_path, "one\ntwo\n", "eins\nzwei\n"), BadRows())
    assert [(e.texts, e.label) for e in found] == [(("one",), "eins"), (("two",), "zwei")]


@pytest.mark.parametrize(
    ("longer", "source", "target"), [("a.en", "1\n2\n3\n", "1\n2\n"), ("a.de", "1\n", "1\n2\n3\n")]
)
def test_files_of_unequal_length_name_the_first_line_that_only_one_has(tmp_path, longer, source, target):
    line = 3 if longer == "a.en" else 2
    with pytest.raises(UserError, match=f"{longer}, line {line}: .* ends before it"):
        read_parallel(*files(tmp_path, source, target), BadRows())


def test_an_empty_line_is_a_bad_row_that_names_its_file(tmp_path):
    bad = BadRows()
    found = read_parallel(*files(tmp_path, "one\n\nthree\n", "eins\nzwei\n \n"), bad)
    assert [e.label for e in found] == ["eins"]
    with pytest.raises(UserError, match=r"2 bad rows \(2 empty text\): .*a.en, line 2: .*a.de, line 3"):
        bad.close("a")


def ragged(seed: int, rows: int = 100):
    random = np.random.RandomState(seed)
    lengths = random.randint(3, 30, (rows, 2))
    return [[5] * n for n in lengths[:, 0]], [[6] * n for n in lengths[:, 1]], lengths


def test_each_pair_comes_once_an_epoch_padded_to_few_shapes():
    source, target, lengths = ragged(0)
    batches = PairBatches.of(source, target, 8, (0, 1), most=6)
    assert len(batches.buckets.buckets) <= 6
    seen, shapes = [], set()
    for step in range(batches.buckets.batches):
        rows, (first, second) = batches.buckets.train_rows(step, seed=3)
        batch = batches.train_batch(step, 3, slice(None))
        shapes.add((batch["ids"].shape, batch["target"].shape))
        assert batch["ids"].shape == (8, first) and batch["target"].shape == (8, second)
        real = rows[rows >= 0]
        assert batch["weight"].sum() == len(real)
        assert (batch["ids"][rows >= 0] == 5).sum(1).tolist() == lengths[real, 0].tolist()
        assert (batch["target"][rows >= 0] == 6).sum(1).tolist() == lengths[real, 1].tolist()
        assert set(np.unique(batch["target"])) <= {1, 6}
        seen += real.tolist()
    assert sorted(seen) == list(range(100))
    assert len(shapes) <= 6


def test_the_shapes_of_an_epoch_do_not_depend_on_the_seed():
    source, target, _ = ragged(1)
    buckets = PairBatches.of(source, target, 8, (0, 0), most=6).buckets
    assert [buckets.train_rows(step, 1)[1] for step in range(13)] == [
        buckets.train_rows(step, 2)[1] for step in range(13)
    ]
    assert buckets.train_rows(0, 1)[0].tolist() != buckets.train_rows(0, 2)[0].tolist()


def test_evaluation_sees_every_pair_once():
    source, target, _ = ragged(2, rows=21)
    batches = PairBatches.of(source, target, 8, (0, 0), most=3)
    rows = np.concatenate([rows for _, rows in batches.eval_batches(slice(None))])
    assert sorted(rows[rows >= 0].tolist()) == list(range(21))


def test_the_longest_batch_has_the_largest_shape_of_both():
    source, target, lengths = ragged(3)
    batch = PairBatches.of(source, target, 8, (0, 0), most=6).longest()
    assert (batch["ids"].shape[1], batch["target"].shape[1]) == tuple(lengths.max(0))
