"""A fine-tuning step of electrax against the same step in PyTorch with Transformers' ELECTRA, in alternation.

    python -m benchmarks.finetune_step [--size small] [--batch 32] [--length 128] [--rounds 15]

Both: two classes from full rows, without an attention mask in PyTorch, the same start weights, float32, dropout 0.1,
AdamW, clipping. electrax also has its layer-wise learning rates; PyTorch's AdamW is the fused one, the default of
Transformers' Trainer. Ratios are electrax / PyTorch of the same round (below 1 is faster).
"""

import argparse
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.report import alternate, environment, percentiles, require_cpu, write
from electrax.experiment.config import FinetuneOptimizerConfig
from electrax.models.encoder import EncoderConfig
from electrax.models.flops import encoder_forward, peak_flops
from electrax.models.sizes import ModelConfig, discriminator_shape
from electrax.tasks.base import Batch, Params
from electrax.tasks.classify import ClassifyTask
from electrax.training.optim import make_optimizer
from electrax.training.sharding import MeshConfig, make_mesh, put_batch
from electrax.training.state import abstract_state, choose_microbatch, fresh_state, make_step

VOCABULARY = 30522
PAD, CLS, SEP = 0, 101, 102
CLASSES = ("0", "1")
OPTIMIZER = FinetuneOptimizerConfig(learning_rate=3e-4, layer_decay=0.8, weight_decay=0.01)


def random_rows(batch: int, length: int) -> Batch:
    """Full rows [CLS] tokens [SEP] of random ordinary tokens, with random labels."""
    random = np.random.default_rng(0)
    ids = random.integers(1000, VOCABULARY, (batch, length)).astype(np.int32)
    ids[:, 0], ids[:, -1] = CLS, SEP
    labels = random.integers(0, len(CLASSES), batch).astype(np.int32)
    return {"ids": ids, "label": labels, "weight": np.ones(batch, np.float32)}


def electrax_step(encoder: EncoderConfig, rows: Batch, microbatch: int) -> tuple[Callable[[], float], Params]:
    """A function that runs one step and returns the loss, and the weights it starts from."""
    task = ClassifyTask(encoder, PAD, SEP, classes=CLASSES, style="dense")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OPTIMIZER, 1000)
    abstract = abstract_state(task, optimizer, rows, mesh)
    state = fresh_state(task, optimizer, rows, abstract, seed=0)
    microbatch = choose_microbatch(microbatch, *rows["ids"].shape, jax.default_backend())
    step = make_step(task, optimizer, abstract, mesh, microbatch, seed=0)
    start = jax.tree.map(np.array, state.params)  # copies, since the step takes the state over

    def run() -> float:
        nonlocal state
        state, loss, _ = step(state, put_batch(rows, mesh))
        return float(loss)

    return run, start


def torch_step(encoder: EncoderConfig, rows: Batch, params: Params) -> Callable[[], float]:
    """The step as one writes it with Transformers."""
    import torch

    from benchmarks.transformers_weights import torch_classifier

    torch.manual_seed(0)
    model = torch_classifier(encoder, params).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.learning_rate,
        eps=OPTIMIZER.epsilon,
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )
    ids, labels = torch.from_numpy(rows["ids"]).long(), torch.from_numpy(rows["label"]).long()

    def run() -> float:
        optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        return loss.item()

    return run


def step_flops(encoder: EncoderConfig, batch: int, length: int, first: int | None = None) -> float:
    """Of matrix products; the backward pass is twice the forward. `first` as in encoder_forward."""
    head = 2 * encoder.width * (encoder.width + len(CLASSES))
    return 3.0 * batch * (length * encoder_forward(encoder, length, first) + head)


def measure(encoder: EncoderConfig, batch: int, length: int, microbatch: int, rounds: int, peak: float) -> dict:
    rows = random_rows(batch, length)
    ours, params = electrax_step(encoder, rows, microbatch)
    contestants = {"electrax": ours, "torch": torch_step(encoder, rows, params)}
    losses = {name: run() for name, run in contestants.items()}  # compiles
    alternate(contestants, 1)  # warms up
    seconds = alternate(contestants, rounds)
    ratios = [a / b for a, b in zip(seconds["electrax"], seconds["torch"], strict=True)]
    row = {"batch": batch, "length": length, "ratio": percentiles(ratios), "ratios": ratios, "first_loss": losses}
    row["flops"] = {"electrax": step_flops(encoder, batch, length, 1), "torch": step_flops(encoder, batch, length)}
    for name, values in seconds.items():
        share = row["flops"][name] / float(np.median(values)) / peak
        row[name] = {"seconds": percentiles(values), "share_of_gemm_rate": share}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--microbatch", type=int, default=0, help="rows; 0: as electrax chooses for the device")
    options = parser.parse_args()
    require_cpu()
    peak = peak_flops(jax.devices()[0])
    encoder = discriminator_shape(ModelConfig(size=options.size), VOCABULARY)
    rows = []
    for batch in options.batch:
        row = measure(encoder, batch, options.length, options.microbatch, options.rounds, peak)
        rows.append(row)
        shown = {
            name: f"{row[name]['seconds']['median']:.3f} s ({row[name]['share_of_gemm_rate']:.0%} of the GEMM rate)"
            for name in ("electrax", "torch")
        }
        ratio = row["ratio"]
        print(
            f"{options.size} {batch} x {options.length}: electrax {shown['electrax']}, torch {shown['torch']}; ratio "
            f"{ratio['median']:.3f} [{ratio['p10']:.3f}, {ratio['p90']:.3f}]",
            flush=True,
        )
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results = {"size": options.size, "gemm_flops_per_second": peak, "target_ratio": 1.0, "goal_ratio": 0.87}
    write("finetune_step.json", environment(versions) | results | {"rows": rows})


if __name__ == "__main__":
    main()
