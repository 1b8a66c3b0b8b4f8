"""A causal language model as an object: it continues texts, and says how likely they are."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt32

from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer
from electrax.inference.batching import padded_length, run_by_length
from electrax.models.attention import KeyValues
from electrax.models.decoding import LOWEST, Decoded, Sampling, decode
from electrax.models.encoder import Embeddings, EncoderConfig
from electrax.models.generator import Generator
from electrax.models.masks import padding_mask
from electrax.tasks.base import Params

ROWS = 16  # decoded together
GREEDY = Sampling()


class Continuation(NamedTuple):
    """What was written after a prompt, and the sum of its tokens' log-probabilities. `reason`: the text came to its
    `end`, to a `stop` string (cut off), or to the `length` that was allowed."""

    text: str
    reason: str
    log_probability: float


class Likelihood(NamedTuple):
    """Of a text: how many tokens it has with the end, and the log-probability of all of them."""

    tokens: int
    log_probability: float

    @property
    def perplexity(self) -> float:
        return math.exp(-self.log_probability / self.tokens)


class CausalModel:
    """A causal generator with its tokenizer. A text is [CLS] and its tokens; [SEP] is its end."""

    def __init__(self, params: Params, tokenizer: Tokenizer, config: EncoderConfig, max_length: int):
        self.params, self.tokenizer, self.config, self.max_length = params, tokenizer, config, max_length
        self._decode = functools.lru_cache(maxsize=16)(self._compiled)
        self._likelihood = jax.jit(functools.partial(_likelihood, config))

    def _compiled(self, length: int, sampling: Sampling) -> Callable[..., Decoded]:
        t = self.tokenizer
        forbidden = (t.pad_id, t.unk_id, t.cls_id, t.mask_id)
        forbidden = tuple({number for number in forbidden if number != t.sep_id})
        return jax.jit(functools.partial(continue_rows, self.config, length, sampling, t.sep_id, t.pad_id, forbidden))

    def warm_up(
        self, max_tokens: int = 64, sampling: Sampling = GREEDY, samples: int = 1, longest: int | None = None
    ) -> int:
        """Compiles what `generate` needs with these options for one prompt of up to `longest` tokens (None: of any
        length), so that no later call does; returns how many programs these are."""
        whole, rest = divmod(samples, ROWS)
        sizes = {ROWS} if whole else set()
        sizes |= {_rounded(rest)} if rest else set()
        most = min(longest or self.max_length, self.max_length - 2)
        shapes = {(rows, self._padded(1 + tokens)) for rows in sizes for tokens in range(most + 1)}
        program = self._program(max_tokens, sampling)
        for rows, length in sorted(shapes):
            ids = np.full((rows, length), self.tokenizer.cls_id, np.int32)
            # a limit of nothing ends it at once
            counts = np.ones(rows, np.int32), np.zeros(rows, np.int32)
            jax.block_until_ready(program(self.params, ids, *counts, _keys(0, [(0, 0)] * rows)))
        return len(shapes)

    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int = 64,
        sampling: Sampling = GREEDY,
        samples: int = 1,
        stop: Sequence[str] = (),
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Continuation]]:
        """For each prompt `samples` continuations of at most `max_tokens` tokens, fewer where the model has no more
        positions. Sample s of prompt p depends on (seed, p, s) alone; `numbers` are the prompts' p, by default from 0
        on. A prompt may be empty; one that leaves no position is a UserError."""
        if isinstance(prompts, str):
            raise UserError("generate: expected a list of prompts, not one text")
        if max_tokens < 1 or samples < 1:
            raise UserError(f"generate: expected max_tokens and samples of at least 1, not {max_tokens} and {samples}")
        rows = [[self.tokenizer.cls_id, *ids] for ids in self.tokenizer.encode_batch(list(prompts))]
        for number, row in enumerate(rows):
            if len(row) >= self.max_length:
                raise UserError(
                    f"generate: prompt {number} has {len(row) - 1} tokens, but the model takes "
                    f"{self.max_length - 2} and one to write"
                )
        named = range(len(rows)) if numbers is None else numbers
        todo = [(p, s) for p in sorted(range(len(rows)), key=lambda p: len(rows[p])) for s in range(samples)]
        found: list[list[Continuation]] = [[None] * samples for _ in rows]  # type: ignore[list-item]
        for place in range(0, len(todo), ROWS):
            some = todo[place : place + ROWS]
            some = some + some[-1:] * (_rounded(len(some)) - len(some))
            keys = _keys(seed, [(named[p], s) for p, s in some])
            decoded = self._continue([rows[p] for p, _ in some], keys, max_tokens, sampling)
            for (p, s), ids, length, score in zip(some, *decoded, strict=True):
                ids = ids[:length]
                text = self._text(rows[p], ids)
                places = [place for place in map(text.find, stop) if place >= 0]
                reason = "stop" if places else "end" if ids[-1] == self.tokenizer.sep_id else "length"
                found[p][s] = Continuation(text[: min(places)] if places else text, reason, float(score))
        return found

    def _continue(self, rows: list[list[int]], keys: jax.Array, max_tokens: int, sampling: Sampling) -> Decoded:
        longest = self._padded(max(map(len, rows)))
        ids = np.full((len(rows), longest), self.tokenizer.pad_id, np.int32)
        for number, row in enumerate(rows):
            ids[number, longest - len(row) :] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        limits = np.minimum(max_tokens, self.max_length - lengths)
        return jax.device_get(self._program(max_tokens, sampling)(self.params, ids, lengths, limits, keys))

    def _program(self, max_tokens: int, sampling: Sampling) -> Callable[..., Decoded]:
        """The same for every prompt, whose row ends at its limit."""
        return self._decode(min(max_tokens, self.max_length - 1), sampling)

    def _padded(self, length: int) -> int:
        return min(padded_length(length), self.max_length - 1)

    def _text(self, prompt: list[int], ids: np.ndarray) -> str:
        """What stands after the prompt, so that both together are the whole text: a token may begin within a word."""
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(ids)

    def likelihood(self, text: str, stride: int = 0) -> Likelihood:
        """Of the text and its end. What is longer than the model is read in windows, each `stride` tokens (0: half a
        window) after the one before, and a token counts in the first window that has it; each has at least a window
        less `stride` tokens before it, but for the text's first."""
        room = self.max_length - 1
        stride = stride or max(1, room // 2)
        if not 1 <= stride <= room:
            raise UserError(f"perplexity: expected a stride from 1 to {room}, not {stride}")
        ids = [*self.tokenizer.encode_batch([text])[0], self.tokenizer.sep_id]
        windows, counted = [], []
        for start in range(0, max(1, len(ids) - room + stride), stride):
            piece, old = ids[start : start + room], 0 if start == 0 else room - stride
            windows.append([self.tokenizer.cls_id, *piece])
            counted.append([0] * (1 + old) + [1] * (len(piece) - old))
        total, tokens = 0.0, sum(map(sum, counted))
        assert tokens == len(ids)
        columns = [(windows, self.tokenizer.pad_id), (counted, 0)]
        forward = functools.partial(self._likelihood, self.params)
        for _, found in run_by_length(
            lambda ids, counted: forward(ids, counted, self.tokenizer.pad_id), columns, self.max_length
        ):
            total += float(found.astype(np.float64).sum())
        return Likelihood(tokens, total)


def _rounded(rows: int) -> int:
    """Up to a power of two, so that few sizes are compiled."""
    return 2 ** (rows - 1).bit_length()


def _keys(seed: int, numbers: Sequence[tuple[int, int]]) -> Key[Array, "B"]:
    """Of each (prompt, sample)."""
    return _fold(jax.random.key(seed), np.array(numbers, np.uint32))


@jax.jit
def _fold(key: Key[Array, ""], numbers: UInt32[Array, "B 2"]) -> Key[Array, "B"]:
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(numbers)


def continue_rows(
    config: EncoderConfig,
    length: int,
    sampling: Sampling,
    end_id: int,
    pad_id: int,
    forbidden: tuple[int, ...],
    params: Params,
    ids: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    limits: Int[Array, "B"],
    keys: jax.Array,
) -> Decoded:
    """Up to `length` tokens (`limits` of each row) after each row's last `lengths` tokens of `ids`, which stand at its
    right end. `forbidden` are never written."""
    table = params.get("generator_embeddings", params["embeddings"])
    model = Generator(config, "causal")
    rows, prompt = ids.shape
    places = prompt + length
    skipped = (prompt - lengths)[:, None]  # places before a row's first token

    def read(cache, tokens, start):
        at = start + jnp.arange(tokens.shape[1])
        positions = jnp.clip(at[None] - skipped, 0, config.max_length - 1)  # rows that are done go on beyond
        seen = jnp.arange(places)
        mask = (seen[None, None] <= at[None, :, None]) & (seen[None, None] >= skipped[..., None])
        embedded = Embeddings(config).apply({"params": table}, tokens, None, positions)
        return model.apply(
            {"params": params["generator"]}, embedded, table["word"], mask[:, None], positions, cache, start,
            method="next_logits",
        )  # fmt: skip

    is_forbidden = jnp.zeros(config.padded_vocab_size, bool).at[jnp.array(forbidden, jnp.int32)].set(True)

    def step(cache, tokens, place):
        logits, cache = read(cache, tokens[:, None], place)
        return jnp.where(is_forbidden, LOWEST, logits[:, 0]), cache

    empty = jnp.zeros((rows, places, config.heads, config.width // config.heads), config.activation_dtype)
    cache = [KeyValues(empty, empty)] * config.layers
    if prompt > 1:
        _, cache = read(cache, ids[:, :-1], jnp.int32(0))
    seen = None
    if sampling.repetition_penalty != 1.0:
        in_prompt = jnp.arange(prompt)[None] >= skipped
        marks = jnp.where(in_prompt, ids, config.padded_vocab_size)
        seen = jnp.zeros((rows, config.padded_vocab_size), bool)
        seen = seen.at[jnp.arange(rows)[:, None], marks].set(True, mode="drop")
    return decode(
        step, cache, ids[:, -1], length, end_id, pad_id,
        start=prompt - 1, sampling=sampling, keys=keys, seen=seen, limits=limits,
    )  # fmt: skip


def _likelihood(config: EncoderConfig, params: Params, ids, counted, pad_id):
    """The log-probability of the tokens of each row that are counted, summed."""
    table = params.get("generator_embeddings", params["embeddings"])
    embedded = Embeddings(config).apply({"params": table}, ids)
    generator = {"params": params["generator"]}
    logits = Generator(config, "causal").apply(generator, embedded, table["word"], padding_mask(ids != pad_id))
    true = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return jnp.sum((true - jax.nn.logsumexp(logits, axis=-1)) * counted, axis=1)
