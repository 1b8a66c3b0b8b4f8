"""Scores on GLUE's dev sets of electrax against the same fine-tuning in PyTorch with Transformers' ELECTRA.

    python -m benchmarks.finetune_parity --glue DIR --init_from WORKDIR [--tasks cola rte] [--seeds 3] [--limit 2000]

Both: the same start weights, batches and hyperparameters (electrax's AdamW, schedule and layer-wise rates, written in
torch here); only dropout is drawn by each library's own generator. Without `--init_from`, whose weights must have the
body "electra", both start from the same random weights of `--layers` x `--width`. For each task a run without dropout
first compares the losses step by step. The results are written after each run; started again with the same settings,
the program goes on where it stopped.
"""

import argparse
import json
import math
import re
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import scipy.stats
import torch
from torch.nn import functional

from benchmarks import report
from benchmarks.transformers_weights import torch_classifier
from electrax.cli import use_compilation_cache
from electrax.data.glue import GLUE
from electrax.experiment.config import FinetuneConfig, FinetuneOptimizerConfig, HeadConfig, read_config
from electrax.experiment.examples import ExamplesConfig
from electrax.experiment.finetune import set_up
from electrax.experiment.run import Run
from electrax.models.sizes import ModelConfig
from electrax.tasks.base import Batch, Params
from electrax.training.sharding import put_batch

RESULTS = "finetune_parity.json"
TASKS = ("cola", "sst2", "mrpc", "rte", "stsb")
CHECK_STEPS, CHECK_TOLERANCE = 20, 1e-4
SIGNIFICANT = 0.05  # a difference this improbable between two sets of seeds is more than noise


def make_run(options: argparse.Namespace, task: str, seed: int, workdir: str, check: bool) -> Run:
    """electrax's run of a task; a `check` is short and without dropout."""
    dropout = 0.0 if check else options.dropout
    config = FinetuneConfig(
        workdir=workdir,
        seed=seed,
        steps=CHECK_STEPS if check else 0,
        epochs=options.epochs,
        batch_size=options.batch,
        init_from=options.init_from,
        model=ModelConfig(layers=options.layers, width=options.width, dropout=dropout, attention_dropout=dropout),
        head=HeadConfig(kind="classes" if GLUE[task].classes else "number", style="dense"),
        data=ExamplesConfig(path=options.glue, format="glue", glue=task, limit=options.limit),
        optimizer=FinetuneOptimizerConfig(learning_rate=options.learning_rate),
    )
    return set_up(config)[0]


def score_of(run: Run, figures: dict[str, float]) -> float:
    """0 for a correlation with a constant, which has no value."""
    return float(np.nan_to_num(run.task.score(figures)))


def train_electrax(run: Run) -> tuple[list[float], float]:
    """The loss of each step, and the score after the last."""
    state, losses = run.state, []
    for step in range(run.steps):
        state, loss, _ = run.step_function(state, put_batch(run.task.train_batch(step), run.mesh))
        losses.append(float(loss))
    return losses, score_of(run, run.evaluate(state.params)[0])


# -- the same in torch -------------------------------------------------------------------------------------------------


class AdamW:
    """Clipping, Adam without bias correction and with ε outside the root, decoupled decay of everything but biases and
    norms, warm-up times linear decay, and a lower rate for each deeper layer."""

    def __init__(self, model: torch.nn.Module, layers: int, config: FinetuneOptimizerConfig, steps: int):
        self.config, self.steps = config, steps
        self.slots = []
        for name, parameter in model.named_parameters():
            decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else config.weight_decay
            multiplier = config.layer_decay ** (layers + 1 - depth(name, layers))
            self.slots.append((parameter, torch.zeros_like(parameter), torch.zeros_like(parameter), decay, multiplier))

    @torch.no_grad()
    def update(self, step: int) -> None:
        c = self.config
        torch.nn.utils.clip_grad_norm_([slot[0] for slot in self.slots], c.clip_norm)
        warmup = c.warmup_share * self.steps
        rate = c.learning_rate * (1 - step / self.steps) * (min(1.0, step / warmup) if warmup else 1.0)
        for parameter, mean, square, decay, multiplier in self.slots:
            mean.mul_(c.beta1).add_(parameter.grad, alpha=1 - c.beta1)
            square.mul_(c.beta2).addcmul_(parameter.grad, parameter.grad, value=1 - c.beta2)
            change = mean / (square.sqrt() + c.epsilon) + decay * parameter
            parameter.sub_(change, alpha=rate * multiplier)
            parameter.grad = None


def depth(name: str, layers: int) -> int:
    """0 for the embeddings and their projection, 1 for the first layer, layers + 1 for the head."""
    layer = re.search(r"encoder\.layer\.(\d+)\.", name)
    if layer:
        return int(layer[1]) + 1
    return 0 if "embeddings" in name else layers + 1


def torch_logits(model: torch.nn.Module, run: Run, batch: Batch) -> torch.Tensor:
    """Of a batch's real rows; segments as a tokenizer of Transformers gives them."""
    ids = torch.from_numpy(batch["ids"][batch["weight"] > 0]).long()
    attention = (ids != run.tokenizer.pad_id).long()
    separators = (ids == run.tokenizer.sep_id).long()
    segments = (separators.cumsum(1) - separators).clamp(max=1) * attention
    return model(ids, attention_mask=attention, token_type_ids=segments).logits


def train_torch(run: Run, params: Params) -> tuple[list[float], float]:
    """As `train_electrax`, from the weights `params`."""
    torch.manual_seed(run.config.seed)
    model = torch_classifier(run.task.encoder, params).train()
    optimizer = AdamW(model, run.task.encoder.layers, run.config.optimizer, run.steps)
    losses = []
    for step in range(run.steps):
        batch = run.task.train_batch(step)
        logits, label = torch_logits(model, run, batch), torch.from_numpy(batch["label"][batch["weight"] > 0])
        if run.task.kind == "number":
            loss = functional.mse_loss(logits[:, 0], label)
        else:
            loss = functional.cross_entropy(logits, label.long())
        loss.backward()
        optimizer.update(step)
        losses.append(loss.item())
    return losses, evaluate_torch(run, model.eval())


@torch.inference_mode()
def evaluate_torch(run: Run, model: torch.nn.Module) -> float:
    logits, labels = [], []
    for batch, _ in run.task.eval_batches():
        logits.append(torch_logits(model, run, batch).numpy())
        labels.append(batch["label"][batch["weight"] > 0])
    return score_of(run, run.task.summarize({}, {"logits": np.concatenate(logits), "label": np.concatenate(labels)}))


# -- comparing ---------------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace, task: str, seed: int, check: bool = False) -> dict[str, Any]:
    """Both libraries' losses, score and seconds from the same start."""
    with tempfile.TemporaryDirectory() as workdir:
        run = make_run(options, task, seed, workdir, check)
        start = jax.tree.map(np.array, run.state.params)  # copies, since the first step takes the state over
        result: dict[str, Any] = {"seed": seed, "steps": run.steps, "metric": run.task.metric}
        for name, train in {"electrax": train_electrax, "torch": lambda run: train_torch(run, start)}.items():
            before = time.perf_counter()
            losses, score = train(run)
            seconds = time.perf_counter() - before  # compilation and evaluation included
            result[name] = {"score": score, "losses": losses, "seconds": seconds}
    return result


def check_losses(options: argparse.Namespace, task: str) -> dict[str, Any]:
    """The largest difference of the two libraries' losses without dropout."""
    result = compare(options, task, 0, check=True)
    ours, theirs = (np.array(result[name]["losses"]) for name in ("electrax", "torch"))
    largest = float(np.abs(ours - theirs).max())
    return {
        "steps": CHECK_STEPS,
        "first_loss": float(ours[0]),
        "last_loss": float(ours[-1]),
        "largest_difference": largest,
        "within_tolerance": largest <= CHECK_TOLERANCE,
    }


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean difference (electrax less torch), pooled standard deviation of the seeds, and Student's t test of the two
    means (equal variances); None where all scores are equal, which says nothing."""
    ours, theirs = (np.array([run[name]["score"] for run in runs]) for name in ("electrax", "torch"))
    difference = float(ours.mean() - theirs.mean())
    if len(runs) < 2:
        return {"difference": difference}
    pooled = math.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / 2)
    if np.ptp(np.concatenate([ours, theirs])) == 0:
        return {"difference": difference, "pooled_std": pooled, "p": None, "within_seed_noise": None}
    p = float(scipy.stats.ttest_ind(ours, theirs).pvalue) if pooled else 0.0
    return {"difference": difference, "pooled_std": pooled, "p": p, "within_seed_noise": p >= SIGNIFICANT}


def summarize_all(tasks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The mean difference over the tasks with a spread of scores, and its standard error."""
    found = [(t["summary"], len(t["runs"])) for t in tasks if t["runs"] and t["summary"].get("p") is not None]
    if not found:
        return {}
    error = math.sqrt(sum(2 * s["pooled_std"] ** 2 / seeds for s, seeds in found)) / len(found)
    return {"difference": float(np.mean([s["difference"] for s, _ in found])), "standard_error": error}


def show(tasks: dict[str, Any], together: dict[str, Any]) -> None:
    wide = 8 * max(len(task["runs"]) for task in tasks.values()) + 2
    print(f"{'task':6}{'score':10}{'electrax':{wide}}{'torch':{wide}}difference  pooled std     p  within seed noise")
    for name, task in tasks.items():
        if not task["runs"]:
            continue
        line, s = f"{name:6}{task['runs'][0]['metric']:10}", task["summary"]
        for side in ("electrax", "torch"):
            line += " ".join(f"{run[side]['score']:.4f}" for run in task["runs"]).ljust(wide)
        line += f"{s['difference']:>+10.4f}"
        if "p" in s:
            answer = {True: "yes", False: "NO", None: "all scores are equal"}[s["within_seed_noise"]]
            line += f"{s['pooled_std']:>12.4f}{math.nan if s['p'] is None else s['p']:>6.2f}  {answer}"
        print(line)
    if together:
        print(f"all: mean difference {together['difference']:+.4f}, standard error {together['standard_error']:.4f}")


# -- the program -------------------------------------------------------------------------------------------------------


def earlier(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run with the same settings has already measured, by task."""
    try:
        results = json.loads((report.RESULTS / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results["tasks"] if results["settings"] == settings else {}


def keep(settings: dict[str, Any], tasks: dict[str, Any]) -> dict[str, Any]:
    """Writes what there is so far; the summary over all tasks."""
    import transformers

    together = summarize_all(tasks.values())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results = {"settings": settings, "tasks": tasks, "all": together}
    report.write(RESULTS, report.environment(versions) | results)
    return together


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", default="../shared/data/glue", help="folder with GLUE's files")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=int, default=0, help="training rows of a task; 0: all")
    parser.add_argument("--learning_rate", type=float, default=0.0, help="0: the paper's for the model's size")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--init_from", default="", help="work directory of an electrax run of the body electra")
    parser.add_argument("--layers", type=int, default=2, help="of random weights")
    parser.add_argument("--width", type=int, default=128, help="of random weights")
    options = parser.parse_args()
    if options.init_from and (body := read_config(options.init_from).model.body) != "electra":
        parser.error(f"--init_from {options.init_from}: its body is {body!r}, which Transformers' ELECTRA has not")
    return options


def main() -> None:
    options = parse()
    use_compilation_cache()  # which the seeds share
    settings = {name: value for name, value in vars(options).items() if name not in ("tasks", "seeds")}
    tasks = earlier(settings)
    together: dict[str, Any] = {}
    for name in options.tasks:
        task = tasks.setdefault(name, {"runs": []})
        if "check" not in task:
            task["check"] = check = check_losses(options, name)
            print(
                f"{name}: {CHECK_STEPS} steps without dropout, loss {check['first_loss']:.4f} to "
                f"{check['last_loss']:.4f}; the largest difference is {check['largest_difference']:.1e}, "
                f"{'within' if check['within_tolerance'] else 'NOT within'} {CHECK_TOLERANCE:g}",
                flush=True,
            )
            together = keep(settings, tasks)
        done = {run["seed"] for run in task["runs"]}
        for seed in sorted(set(range(options.seeds)) - done):
            run = compare(options, name, seed)
            for side in ("electrax", "torch"):
                run[side]["final_loss"] = float(np.mean(run[side].pop("losses")[-20:]))
            task["runs"].append(run)
            task["summary"] = summarize(task["runs"])
            together = keep(settings, tasks)
            ours, theirs = run["electrax"], run["torch"]
            print(
                f"{name}, seed {seed}, {run['steps']} steps: {run['metric']} {ours['score']:.4f} in "
                f"{ours['seconds']:.0f} s, torch {theirs['score']:.4f} in {theirs['seconds']:.0f} s",
                flush=True,
            )
    show(tasks, together or summarize_all(tasks.values()))


if __name__ == "__main__":
    main()
