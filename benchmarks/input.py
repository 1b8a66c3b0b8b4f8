"""Input: the rate and memory of `electrax prepare`, and the rate of reading its rows.

    python -m benchmarks.input                        # a few minutes; writes benchmarks/results/input.json
    python -m benchmarks.input --memory_mb 1000       # the memory of preparing 1 GB

Rate: against the tokenizer library's own encode_batch with its own threads, on the same lines in memory, in turns. The
text is the bundled sample, repeated.
"""

import argparse
import lzma
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

from benchmarks.report import environment, spread, write
from electrax.data.batches import train_rows
from electrax.data.corpus import Corpus, sample_path
from electrax.data.prepare import PrepareConfig, prepare
from electrax.data.tokenizer import Tokenizer

BATCH, LENGTH = 128, 128


def repeated_sample(path: Path, megabytes: float) -> None:
    """Write about so many MB of text."""
    text = lzma.open(sample_path()).read() + b"\n\n"
    with open(path, "wb") as file:
        for _ in range(max(1, round(megabytes * 1e6 / len(text)))):
            file.write(text)


def prepare_rate(directory: Path, megabytes: float, rounds: int) -> dict:
    """MB of text a second, of `prepare` (starting processes and writing included) and of encode_batch."""
    text = directory / "rate.txt"
    repeated_sample(text, megabytes)
    lines = [line for line in text.read_text(encoding="utf-8").split("\n") if line.strip()]
    Tokenizer.train("wordpiece", lines[: len(lines) // max(1, round(megabytes / 1.3))], 30522).save(directory)
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(directory / "tokenizer.json"))
    mb = text.stat().st_size / 1e6
    rates: dict[str, list[float]] = {"prepare": [], "encode_batch": []}
    for number in range(rounds):
        start = time.perf_counter()
        library.encode_batch(lines, add_special_tokens=False)
        rates["encode_batch"].append(mb / (time.perf_counter() - start))
        start = time.perf_counter()
        prepare(PrepareConfig((str(text),), str(directory / f"corpus{number}"), tokenizer=str(directory)))
        rates["prepare"].append(mb / (time.perf_counter() - start))
    shares = [a / b for a, b in zip(rates["prepare"], rates["encode_batch"], strict=True)]
    return {
        "text_mb": mb,
        "prepare_mb_per_second": spread(rates["prepare"]),
        "encode_batch_mb_per_second": spread(rates["encode_batch"]),
        "share_of_encode_batch": spread(shares),
        "target_share": 0.8,
    }


def peak_mb(pid: int) -> float:
    """A process's own peak resident size (Linux). getrusage would count the parent's pages, which spawning copies."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def _prepare_and_measure(text: str, out: str, result) -> None:
    peaks: dict[int, float] = {}

    def measure(_) -> None:
        for child in multiprocessing.active_children():
            peaks[child.pid] = peak_mb(child.pid)

    prepare(PrepareConfig((text,), out), measure)
    result.send((peak_mb(os.getpid()), list(peaks.values())))


def memory(directory: Path, megabytes: float) -> dict:
    """Peak resident MB of `prepare`, training a WordPiece tokenizer included, in a process of its own."""
    text = directory / "memory.txt"
    repeated_sample(text, megabytes)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_prepare_and_measure, args=(str(text), str(directory / "memory"), send))
    process.start()
    send.close()
    main, workers = receive.recv()
    process.join()
    return {
        "text_mb": text.stat().st_size / 1e6,
        "main_mb": main,
        "workers_mb": workers,
        "sum_of_peaks_mb": main + sum(workers),
        "target_mb": 1500,
    }


def reading_rate(corpus: Corpus, rounds: int, steps: int = 2000) -> dict:
    """Tokens a second, in batches of 128 rows of 128 in shuffled order."""
    rates = []
    for number in range(rounds):
        start = time.perf_counter()
        for step in range(number * steps, (number + 1) * steps):
            corpus.rows("train", train_rows(step, BATCH, corpus.size("train"), 0))
        rates.append(steps * BATCH * LENGTH / (time.perf_counter() - start))
    return {"rows": corpus.size("train"), "tokens_per_second": spread(rates), "target": 100e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=32, help="text for the rates")
    parser.add_argument("--memory_mb", type=float, default=64, help="text for the memory")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        results = {
            "prepare": prepare_rate(directory, options.mb, options.rounds),
            "reading": reading_rate(Corpus.open(directory / "corpus0"), options.rounds),
            "memory": memory(directory, options.memory_mb),
        }
    write("input.json", environment() | results)
    rate, share = results["prepare"]["prepare_mb_per_second"], results["prepare"]["share_of_encode_batch"]
    tokens, peak = results["reading"]["tokens_per_second"], results["memory"]
    print(f"{'':28}{'median':>10}{'min':>10}{'max':>10}  target")
    for name, value, unit, target in (
        ("prepare, MB/s", rate, 1, ""),
        ("  share of encode_batch, %", share, 0.01, ">= 80"),
        ("reading, M tokens/s", tokens, 1e6, ">= 100"),
    ):
        print(f"{name:28}" + "".join(f"{value[k] / unit:10.1f}" for k in ("median", "min", "max")) + f"  {target}")
    print(f"{'memory, MB (sum of peaks)':28}{peak['sum_of_peaks_mb']:10.0f}{'':20}  <= 1500 at 1 GB of text; "
          f"{peak['text_mb']:.0f} MB here, {len(peak['workers_mb'])} workers")  # fmt: skip


if __name__ == "__main__":
    main()
