"""A work directory that somebody else made may say anything of itself."""

import json

import pytest

from electrax.config import UserError, to_toml
from electrax.experiment.config import FinetuneConfig, finished
from electrax.experiment.head import read_head

HEAD = {
    "task": "classify",
    "kind": "classes",
    "style": "linear",
    "metric": "accuracy",
    "classes": ["a", "b"],
    "rows": "",
}


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(FinetuneConfig(workdir="run", seeds=2)))
    return tmp_path / "run"


@pytest.mark.parametrize("best", ["../elsewhere", "/etc", "", 3, None, ["seed-1"]])
def test_the_best_run_lies_in_its_work_directory(workdir, best):
    (workdir / "results.json").write_text(json.dumps({"best": best}))
    with pytest.raises(UserError, match="results.json: expected the name of a folder beside it as the best run"):
        finished(workdir)


@pytest.mark.parametrize(
    "change", [{"task": "tag"}, {"classes": "ab"}, {"classes": [1, 2]}, {"scale": "1"}, {"kind": None}, {"metric": []}]
)
def test_a_head_that_is_not_of_its_task_is_damaged(workdir, change):
    (workdir / "head.json").write_text(json.dumps(HEAD | {"scale": 1.0}))
    assert read_head(workdir)["classes"] == ["a", "b"]
    (workdir / "head.json").write_text(json.dumps(HEAD | {"scale": 1.0} | change))
    with pytest.raises(UserError, match="head.json: .*damaged"):
        read_head(workdir)
