"""A pretraining step of electrax against the same step in PyTorch with Transformers' ELECTRA, in alternation.

    python -m benchmarks.pretrain_step [--size small] [--batch 16 32] [--length 128] [--rounds 7]

Both: float32, dropout 0.1, 15 % dynamic masking in the step, vocabulary at the masked positions only, replacements
sampled from the generator, losses 1 and 50, clipping, AdamW, PyTorch's the fused one. Rows are full, so PyTorch gets no
attention mask, which would keep it from its quickest attention. It samples with Gumbel noise, as one writes it: a
random number for each piece of the vocabulary, where electrax draws one a position. Ratios are electrax / PyTorch of
the same round (below 1 is faster).
"""

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from benchmarks.report import alternate, environment, ratios, require_cpu, shown, spread, versions, write
from electrax.config import build, merge, parse_overrides
from electrax.data.batches import train_rows
from electrax.experiment.config import PretrainConfig
from electrax.experiment.pretrain import make_feed, make_task
from electrax.models.flops import peak_flops
from electrax.models.sizes import discriminator_shape, generator_shape
from electrax.tasks.base import Batch
from electrax.tasks.corruption import slot_count
from electrax.training.optim import make_optimizer
from electrax.training.sharding import MeshConfig, make_mesh
from electrax.training.state import abstract_state, choose_microbatch, choose_together, fresh_state, make_step

VOCABULARY = 30522
SPECIAL = {"pad": 0, "cls": 101, "sep": 102, "mask": 103}
ROWS = 4096  # of the random corpus


def step_config(size: str, batch: int, length: int, *words: str) -> PretrainConfig:
    """The config of a step: the defaults, these numbers, and over them words as `electrax pretrain` takes them."""
    low = {
        "workdir": "unused",
        "steps": 1000,
        "batch_size": batch,
        "model": {"size": size},
        "data": {"max_length": length, "layout": "segments"},
    }
    return build(PretrainConfig, merge(low, parse_overrides(words)), "benchmark")


class RandomCorpus:
    """Full rows [CLS] tokens [SEP] of random ordinary tokens, read as a prepared corpus is."""

    def __init__(self, length: int):
        self._rows = np.random.default_rng(0).integers(1000, VOCABULARY, (ROWS, length)).astype(np.uint16)
        self._rows[:, 0], self._rows[:, -1] = SPECIAL["cls"], SPECIAL["sep"]
        self.manifest = SimpleNamespace(max_length=length, dtype=self._rows.dtype)

    def size(self, split: str) -> int:
        return len(self._rows)

    def rows(self, split: str, indices: np.ndarray) -> np.ndarray:
        return self._rows[indices]


class Training:
    """A pretraining of electrax on random rows: its state, and one call of the step after the other."""

    def __init__(self, config: PretrainConfig):
        corpus, mesh = RandomCorpus(config.data.max_length), make_mesh(MeshConfig(), jax.devices()[:1])
        task = make_task(config, VOCABULARY, SPECIAL, corpus)
        optimizer, rows = make_optimizer(config.optimizer, config.steps), task.train_batch(0)
        abstract = abstract_state(task, optimizer, rows, mesh)
        microbatch = choose_microbatch(
            config.optimizer.microbatch, config.batch_size, config.data.max_length, jax.default_backend()
        )
        self.state = fresh_state(task, optimizer, rows, abstract, config.seed)
        self.flops = task.flops(config.batch_size, config.data.max_length)
        due = (config.log.every, config.eval.every, config.checkpoint.every)
        self.steps_a_call = choose_together(config.steps_per_dispatch, due, jax.devices()[0], self.flops)
        self._step = make_step(task, optimizer, abstract, mesh, microbatch, config.seed)
        self._feed, self._done = make_feed(config, task, corpus, mesh), 0

    def compiled(self) -> jax.stages.Compiled:
        return self._step.compiled(self.state, self._rows(), several=self.steps_a_call > 1)

    def start(self) -> jax.Array:
        """Reads rows and starts the steps of a call; the last one's loss, which may not be known yet."""
        take = self._step if self.steps_a_call == 1 else self._step.several
        self.state, loss, _ = take(self.state, self._rows())
        self._done += self.steps_a_call
        return loss if self.steps_a_call == 1 else loss[-1]

    def _rows(self) -> Batch:
        return self._feed(self._done, self.steps_a_call)


def electrax_step(size: str, batch: int, length: int, microbatch: int) -> tuple[Callable[[], float], float]:
    """A function that runs one step and returns the loss, and the FLOPs of the step."""
    training = Training(step_config(size, batch, length, f"--optimizer.microbatch={microbatch}"))
    return lambda: float(training.start()), training.flops


def torch_step(
    config: PretrainConfig, device: str = "cpu", autocast: bool = False, compile_mode: str = ""
) -> Callable[[], Any]:
    """The step a competent PyTorch user writes with Transformers: shared embeddings, masked positions gathered. Of the
    function that is returned each call starts a step and gives the loss.

    `autocast` computes in bfloat16; `compile_mode` is torch.compile's ("": eager).
    """
    import torch
    from torch.nn import functional
    from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TensorFloat32 where autocast leaves a product in float32
    shape = discriminator_shape(config.model, VOCABULARY)
    small = generator_shape(config.model, config.generator, shape)

    def torch_config(c):
        return ElectraConfig(
            vocab_size=VOCABULARY,
            embedding_size=c.embedding_width,
            hidden_size=c.width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            intermediate_size=c.feed_forward,
            hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.attention_dropout,
            attn_implementation="sdpa",
        )

    discriminator, generator = ElectraForPreTraining(torch_config(shape)), ElectraForMaskedLM(torch_config(small))
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight
    generator.to(device).train(), discriminator.to(device).train()
    parameters = list({id(p): p for m in (generator, discriminator) for p in m.parameters()}.values())
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, eps=1e-6, weight_decay=0.01, fused=True)
    batch, length = config.batch_size, config.data.max_length
    corpus, slots, done = RandomCorpus(length), slot_count(length, config.objective.mask_prob), 0

    def compute(ids):
        noise = torch.rand(ids.shape, device=device)
        noise[:, 0] = noise[:, -1] = -1.0
        positions = noise.topk(slots, dim=1).indices
        hidden = torch.rand(positions.shape, device=device) >= 0.15
        original = ids.gather(1, positions)
        masked = ids.scatter(1, positions, torch.where(hidden, SPECIAL["mask"], original))
        states = generator.electra(masked)[0]
        states = states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
        logits = generator.generator_lm_head(generator.generator_predictions(states))
        generator_loss = functional.cross_entropy(logits.flatten(0, 1), original.flatten())
        with torch.no_grad():
            gumbel = -torch.log(-torch.log(torch.rand_like(logits) + 1e-9) + 1e-9)
            sampled = (logits + gumbel).argmax(-1)
            corrupted = ids.scatter(1, positions, sampled)
            replaced = (corrupted != ids).float()
        scores = discriminator(corrupted).logits
        return generator_loss + 50.0 * functional.binary_cross_entropy_with_logits(scores, replaced)

    if compile_mode:
        compute = torch.compile(compute, mode=compile_mode)

    def start_step():
        nonlocal done
        rows = corpus.rows("train", train_rows(done, batch, corpus.size("train"), config.seed))
        ids = torch.from_numpy(rows.astype(np.int64))
        if device != "cpu":
            ids = ids.pin_memory().to(device, non_blocking=True)
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=autocast):
            loss = compute(ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        done += 1
        return loss.detach()

    return start_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--microbatch", type=int, default=0, help="rows; 0: as electrax chooses for the device")
    options = parser.parse_args()
    require_cpu()
    peak = peak_flops(jax.devices()[0])
    rows = []
    for batch in options.batch:
        ours, flops = electrax_step(options.size, batch, options.length, options.microbatch)
        theirs = torch_step(step_config(options.size, batch, options.length))
        contestants = {"electrax": ours, "torch": lambda t=theirs: float(t())}
        losses = {name: run() for name, run in contestants.items()}  # compiles
        alternate(contestants, 1)  # warms up
        seconds = alternate(contestants, options.rounds)
        ratio = ratios(seconds, "electrax", "torch")
        row = {"batch": batch, "length": options.length, "ratio": ratio, "first_loss": losses, "flops": flops}
        for name, values in seconds.items():
            row[name] = {"seconds": spread(values), "share_of_gemm_rate": flops / float(np.median(values)) / peak}
        rows.append(row)
        print(
            f"{options.size} {batch} x {options.length}: electrax {row['electrax']['seconds']['median']:.3f} s "
            f"({row['electrax']['share_of_gemm_rate']:.0%} of the GEMM rate), torch "
            f"{row['torch']['seconds']['median']:.3f} s ({row['torch']['share_of_gemm_rate']:.0%}); ratio "
            f"{shown(ratio, 3)}",
            flush=True,
        )
    results = {"gemm_flops_per_second": peak, "rows": rows}
    write("pretrain_step.json", environment(versions("torch", "transformers")) | results)


if __name__ == "__main__":
    main()
