"""Starts a pretraining from word vectors of its own corpus: its step 0, which `electrax pretrain` then continues.

    python -m benchmarks.word_vectors CONFIG [--section.key value …]

Positive pointwise mutual information of the tokens within a window of five (a pair at distance d counts 1 / d, contexts
to the power 0.75; Levy, Goldberg & Dagan 2015), reduced to the width of the word table by a singular value
decomposition, each row of unit length. Needs scikit-learn.
"""

import sys

import jax
import numpy as np
import scipy.sparse
from jaxtyping import Float
from sklearn.utils.extmath import randomized_svd

from electrax.config import UserError, load
from electrax.data.corpus import Corpus
from electrax.experiment.config import PretrainConfig
from electrax.experiment.pretrain import set_up
from electrax.training.sharding import put_everywhere

WINDOW, CONTEXT_POWER, ROWS = 5, 0.75, 4096


def word_vectors(corpus: Corpus, width: int) -> Float[np.ndarray, "V D"]:
    """Unit vectors of the tokens; zeros for those that are special or never seen."""
    size, rows = corpus.manifest.vocab_size, corpus.size("train")
    counts = np.zeros(size * size, np.float32)
    for first in range(0, rows, ROWS):
        ids = corpus.rows("train", np.arange(first, min(rows, first + ROWS))).astype(np.int64)
        for distance in range(1, WINDOW + 1):
            pairs, number = np.unique(ids[:, :-distance] * size + ids[:, distance:], return_counts=True)
            counts[pairs] += number / distance
    table = counts.reshape(size, size)
    table = table + table.T
    special = list(corpus.manifest.special_ids.values())
    table[special], table[:, special] = 0, 0
    context = table.sum(0) ** CONTEXT_POWER
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(table / table.sum(1)[:, None] * (context.sum() / context)[None, :])
    information = np.maximum(np.where(np.isfinite(information), information, 0), 0)
    left, values, _ = randomized_svd(scipy.sparse.csr_matrix(information), width, n_iter=4, random_state=0)
    vectors = left * np.sqrt(values)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def start(config: PretrainConfig) -> None:
    """Saves step 0 of the run. Raises UserError where it has begun already."""
    run = set_up(config)
    if run.start or 0 in run.checkpoints.steps():
        raise UserError(f"{run.config.workdir}: the run has begun already")
    word = run.state.params["embeddings"]["word"]
    vectors, table = word_vectors(run.task.corpus, word.shape[1]), np.array(word)
    known = np.linalg.norm(vectors, axis=1) > 0.5
    table[: len(vectors)][known] = vectors[known]
    embeddings = run.state.params["embeddings"] | {"word": put_everywhere(table, word.sharding)}
    state = run.state.replace(params=run.state.params | {"embeddings": embeddings})
    run.checkpoints.save(0, jax.block_until_ready(state))
    run.checkpoints.wait()
    run.checkpoints.close()


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    start(load(PretrainConfig, sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    main()
