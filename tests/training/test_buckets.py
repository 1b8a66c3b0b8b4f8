"""Runs that are kept in a bucket, of a server on this machine that speaks Google Cloud Storage's protocol."""

import hashlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from electrax.cli import run
from electrax.config import UserError
from electrax.experiment.run import load_params
from electrax.storage import cache_folder, files_below
from tests.fixtures.bucket import bucket

needs_gcsfs = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")
OPTIONS = [
    "--steps=12", "--batch_size=8", "--model.layers=1", "--model.width=16", "--model.heads=2",
    "--model.embedding_width=8", "--model.max_length=32", "--generator.width=8", "--generator.heads=2",
    "--generator.layers=1", "--eval.rows=8", "--eval.every=6", "--checkpoint.every=6", "--log.every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with bucket() as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def here(corpus, tmp_path_factory):
    """A run on the disk, to compare with."""
    workdir = tmp_path_factory.mktemp("buckets") / "here"
    assert run(pretraining(corpus.directory, workdir)) == 0
    return workdir


@pytest.fixture(scope="module")
def there(corpus, server):
    """The same from and in the bucket."""
    for name, path in files_below(corpus.directory).items():
        server.put(f"corpus/{name}", path.read_bytes(), {})
    assert run(pretraining("gs://bucket/corpus", "gs://bucket/run")) == 0


def pretraining(data: object, workdir: object) -> list[str]:
    return ["pretrain", "tiny", f"--data.path={data}", f"--workdir={workdir}", *OPTIONS]


@pytest.fixture(scope="module")
def copied(server, tmp_path_factory):
    """Copies a folder of the bucket to the disk, to look into."""

    def copy(prefix: str) -> pathlib.Path:
        folder = tmp_path_factory.mktemp("copied")
        for name, stored in server.objects.items():
            if name.startswith(f"{prefix}/"):
                path = folder / name.removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stored.data)
        return folder

    return copy


def weights(workdir) -> dict[str, bytes]:
    _, params = load_params(workdir)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def logged(workdir) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@needs_gcsfs
def test_a_run_in_a_bucket_is_that_on_the_disk(here, there, copied):
    found = copied("run")
    assert weights(found) == weights(here)
    assert logged(found) == logged(here)
    ours, theirs = ({*map(str, files_below(folder))} for folder in (here, found))
    named = {name for name in ours if "/" not in name and "tfevents" not in name}
    assert named == {"config.toml", "tokenizer.json", "metrics.jsonl", "results.json"} and named <= theirs
    assert any("tfevents" in name for name in theirs)
    assert {name.split("/")[1] for name in theirs if name.endswith("checksums.json")} == {"6", "12"}


@needs_gcsfs
def test_a_corpus_in_a_bucket_is_kept_in_the_cache(there, corpus):
    manifest = hashlib.sha256((corpus.directory / "manifest.json").read_bytes()).hexdigest()
    kept = cache_folder() / "corpora" / manifest[:32]
    assert {name: path.read_bytes() for name, path in files_below(kept).items()} == {
        name: path.read_bytes() for name, path in files_below(corpus.directory).items()
    }


@needs_gcsfs
def test_a_run_in_a_bucket_that_is_killed_goes_on_to_the_same_weights(server, corpus, here, copied):
    command = pretraining(corpus.directory, "gs://bucket/killed")
    variables = (
        os.environ | {"JAX_NUM_CPU_DEVICES": "8"} | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "electrax", *command],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while "killed/checkpoints/6/checksums.json" not in server.objects:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(command) == 0
    assert weights(copied("killed")) == weights(here)
    assert logged(copied("killed")) == logged(here)


@needs_gcsfs
def test_a_damaged_checkpoint_of_a_bucket_is_set_aside_and_the_one_before_it_used(server, there, here, copied, caplog):
    for name in [name for name in server.objects if name.startswith("run/") and "tfevents" not in name]:
        server.put(name.replace("run/", "damaged/", 1), server.objects[name].data, {})
    name = "damaged/checkpoints/12/params/manifest.ocdbt"
    data = bytearray(server.objects[name].data)
    data[7] ^= 1
    server.put(name, bytes(data), {})
    config = server.objects["damaged/config.toml"].data.replace(b"gs://bucket/run", b"gs://bucket/damaged")
    server.put("damaged/config.toml", config, {})
    assert run(pretraining("gs://bucket/corpus", "gs://bucket/damaged")) == 0
    assert "gs://bucket/damaged/checkpoints/12: damaged (params/manifest.ocdbt differs" in caplog.text
    assert "damaged/checkpoints/12.damaged/params/manifest.ocdbt" in server.objects
    assert weights(copied("damaged")) == weights(here)


@needs_gcsfs
def test_a_model_in_a_bucket_is_fine_tuned_over_seeds_and_predicts(server, there, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "a good day,yes\na bad day,no\n" * 4)
    options = [f"--data.path={rows}", f"--data.dev={rows}", "--data.text=text", "--data.label=label", "--steps=2"]
    assert (
        run(["finetune", "csv", *options, "--init_from=gs://bucket/run", "--workdir=gs://bucket/tuned", "--seeds=2"])
        == 0
    )
    lines = tmp_path / "lines.txt"
    lines.write_text("a good day\n")
    assert run(["predict", "gs://bucket/tuned", str(lines)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["label"] in ("yes", "no")
    kept = {name.split("/")[1] for name in server.objects if name.startswith("tuned/seed-") and "checkpoints" in name}
    results = json.loads(server.objects["tuned/results.json"].data)
    assert kept == {results["best"], results["median_run"]}


@needs_gcsfs
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.path=sample"], "gs://bucket/new: text that is not prepared needs a path on this machine"),
        (["--profile=true"], "gs://bucket/new: the trace of --profile needs a path on this machine"),
    ],
)
def test_what_a_bucket_cannot_hold_is_said_before_training(server, corpus, options, said):
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        run([*pretraining(corpus.directory, "gs://bucket/new"), *options])
    assert not any(name.startswith("new/") for name in server.objects)
