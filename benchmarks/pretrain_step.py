"""A pretraining step of electrax against the same step in PyTorch with Transformers' ELECTRA, in alternation.

    python -m benchmarks.pretrain_step [--size small] [--batch 16 32] [--length 128] [--rounds 7]

Both: float32, dropout 0.1, 15 % dynamic masking in the step, vocabulary at the masked positions only, Gumbel sampling,
losses 1 and 50, clipping, AdamW. Ratios are electrax / PyTorch of the same round (below 1 is faster).
"""

import argparse
import time

import jax
import numpy as np

from benchmarks.report import environment, spread, write
from electrax.data.rows import Special
from electrax.models.flops import peak_flops, pretraining_step
from electrax.models.sizes import GeneratorConfig, ModelConfig, discriminator_shape, generator_shape
from electrax.tasks.corruption import slot_count
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds
from electrax.training.optim import OptimizerConfig, make_optimizer
from electrax.training.sharding import MeshConfig, make_mesh, put_batch
from electrax.training.state import abstract_state, choose_microbatch, fresh_state, make_step

VOCABULARY = 30522
SPECIAL = Special(pad=0, cls=101, sep=102)
MASK = 103


def random_rows(batch: int, length: int) -> np.ndarray:
    """Full rows [CLS] tokens [SEP] of random ordinary tokens."""
    rows = np.random.default_rng(0).integers(1000, VOCABULARY, (batch, length)).astype(np.int32)
    rows[:, 0], rows[:, -1] = SPECIAL.cls, SPECIAL.sep
    return rows


def electrax_step(size: str, batch: int, length: int, microbatch: int):
    """A function that runs one step and returns the loss, and the FLOPs of the step."""
    model = ModelConfig(size=size)
    discriminator = discriminator_shape(model, VOCABULARY)
    generator = generator_shape(model, GeneratorConfig(), discriminator)
    special = SpecialIds(SPECIAL.pad, SPECIAL.cls, SPECIAL.sep, MASK)
    task = PretrainTask(ObjectiveConfig(), discriminator, generator, special, layout="segments")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    rows = {"ids": random_rows(batch, length)}
    abstract = abstract_state(task, optimizer, rows, mesh)
    state = fresh_state(task, optimizer, rows, abstract, seed=0)
    microbatch = choose_microbatch(microbatch, batch, length, jax.default_backend())
    step = make_step(task, optimizer, abstract, mesh, microbatch, seed=0)

    def run() -> float:
        nonlocal state
        state, loss, _ = step(state, put_batch(rows, mesh))
        return float(loss)

    slots = slot_count(length, 0.15)
    return run, pretraining_step(generator, discriminator, batch, length, slots)


def torch_step(size: str, batch: int, length: int):
    """The step a competent PyTorch user writes with Transformers: shared embeddings, masked positions gathered."""
    import torch
    from torch.nn import functional
    from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

    torch.manual_seed(0)
    shape = discriminator_shape(ModelConfig(size=size), VOCABULARY)
    small = generator_shape(ModelConfig(size=size), GeneratorConfig(), shape)

    def config(c):
        return ElectraConfig(
            vocab_size=VOCABULARY,
            embedding_size=c.embedding_width,
            hidden_size=c.width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            intermediate_size=c.feed_forward,
            attn_implementation="sdpa",
        )

    discriminator, generator = ElectraForPreTraining(config(shape)), ElectraForMaskedLM(config(small))
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight
    parameters = list({id(p): p for m in (generator, discriminator) for p in m.parameters()}.values())
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, eps=1e-6, weight_decay=0.01)
    ids = torch.from_numpy(random_rows(batch, length)).long()
    attention = torch.ones_like(ids)
    slots = slot_count(length, 0.15)
    generator.train(), discriminator.train()

    def run() -> float:
        noise = torch.rand(ids.shape)
        noise[:, 0] = noise[:, -1] = -1.0
        positions = noise.topk(slots, dim=1).indices
        hidden = torch.rand(positions.shape) >= 0.15
        original = ids.gather(1, positions)
        masked = ids.scatter(1, positions, torch.where(hidden, MASK, original))
        states = generator.electra(masked, attention_mask=attention)[0]
        states = states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
        logits = generator.generator_lm_head(generator.generator_predictions(states))
        generator_loss = functional.cross_entropy(logits.flatten(0, 1), original.flatten())
        with torch.no_grad():
            gumbel = -torch.log(-torch.log(torch.rand_like(logits) + 1e-9) + 1e-9)
            sampled = (logits + gumbel).argmax(-1)
            corrupted = ids.scatter(1, positions, sampled)
            replaced = (corrupted != ids).float()
        scores = discriminator(corrupted, attention_mask=attention).logits
        loss = generator_loss + 50.0 * functional.binary_cross_entropy_with_logits(scores, replaced)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.detach())

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--microbatch", type=int, default=0, help="rows; 0: as electrax chooses for the device")
    options = parser.parse_args()
    peak = peak_flops(jax.devices()[0])
    rows = []
    for batch in options.batch:
        ours, flops = electrax_step(options.size, batch, options.length, options.microbatch)
        theirs = torch_step(options.size, batch, options.length)
        contestants = {"electrax": ours, "torch": theirs}
        losses = {name: [run() for _ in range(2)][0] for name, run in contestants.items()}  # warm-up and compilation
        seconds = {name: [] for name in contestants}
        for _ in range(options.rounds):
            for name, run in contestants.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        ratio = spread([a / b for a, b in zip(seconds["electrax"], seconds["torch"], strict=True)])
        row = {"batch": batch, "length": options.length, "ratio": ratio, "first_loss": losses, "flops": flops}
        for name, values in seconds.items():
            row[name] = {"seconds": spread(values), "share_of_gemm_rate": flops / float(np.median(values)) / peak}
        rows.append(row)
        print(
            f"{options.size} {batch} x {options.length}: electrax {row['electrax']['seconds']['median']:.3f} s "
            f"({row['electrax']['share_of_gemm_rate']:.0%} of the GEMM rate), torch "
            f"{row['torch']['seconds']['median']:.3f} s ({row['torch']['share_of_gemm_rate']:.0%}); ratio "
            f"{ratio['median']:.3f} [{ratio['min']:.3f}, {ratio['max']:.3f}]",
            flush=True,
        )
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write("pretrain_step.json", environment(versions) | {"gemm_flops_per_second": peak, "rows": rows})


if __name__ == "__main__":
    main()
