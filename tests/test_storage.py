import errno
import importlib.util
import os

import pytest
from etils import epath

from electrax import storage
from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer
from electrax.storage import Mirror, new_directory, on_this_machine, own_folder, path_of, write_atomically

needs_gcsfs = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")


def test_a_folder_of_ones_own_is_closed_to_others(tmp_path):
    assert own_folder(tmp_path / "own").stat().st_mode & 0o777 == 0o700
    assert own_folder(tmp_path / "own") == tmp_path / "own"


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_folder_that_others_can_write_into_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(UserError, match="can be written by others; expected a folder of your own"):
        own_folder(tmp_path)


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        own_folder(tmp_path)


def test_a_new_directory_is_its_users_alone_and_one_that_was_there_stays_as_open_as_it_was(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    for name, mode in {"open": 0o755, "new": 0o700}.items():
        with new_directory(tmp_path / name) as made:
            (made / "a").touch()
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_a_link_is_not_followed_in_writing(tmp_path):
    (tmp_path / "theirs").write_text("kept")
    for name in ("config.toml", "config.toml.tmp", "tokenizer.json", "tokenizer.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    write_atomically(tmp_path / "config.toml", "ours")
    Tokenizer.train("wordpiece", ["a cat"], 50).save(tmp_path)
    assert (tmp_path / "theirs").read_text() == "kept" and (tmp_path / "config.toml").read_text() == "ours"
    assert not any(path.is_symlink() for path in tmp_path.iterdir())


def test_a_file_whose_writing_fails_halfway_stays_as_it_was(tmp_path, monkeypatch):
    def full(file, data):
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(tmp_path / "a", "before")
    monkeypatch.setattr(storage, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", b"afterwards")
    assert (tmp_path / "a").read_text() == "before"


@needs_gcsfs
def test_a_bucket_that_cannot_be_reached_is_one_line(monkeypatch):
    def refused(self):
        raise ConnectionError("no route\nto it")

    monkeypatch.setattr(epath.Path("gs://closed").__class__, "exists", refused)
    with pytest.raises(UserError, match=r"^gs://closed/run: cannot be reached: no route$"):
        path_of("gs://closed/run")


def test_a_mirror_goes_on_when_its_bucket_fails_and_keeps_what_it_could_not_copy(tmp_path, monkeypatch, caplog):
    def closed(path, content):
        raise ConnectionError("no route to it")

    (tmp_path / "metrics.jsonl").write_text("before\n")
    mirror = Mirror(tmp_path, ["metrics.jsonl", "not there"])
    with open(mirror.folder / "metrics.jsonl", "a") as file:
        file.write("after\n")
    assert mirror.copy() and (tmp_path / "metrics.jsonl").read_text() == "before\n"  # too soon again
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomically", closed)
        assert not mirror.copy(now=True)
        mirror.close()
    assert f"what was to be written there is in {mirror.folder}" in caplog.text
    assert (mirror.folder / "metrics.jsonl").read_text() == "before\nafter\n"
    mirror.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "before\nafter\n" and not mirror.folder.exists()


def test_what_cannot_be_a_bucket_is_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"^s3://b/run: expected a path, or gs://BUCKET/…$"):
        path_of("s3://b/run")
    with pytest.raises(UserError, match=r"^gs://: expected a path, or gs://BUCKET/…$"):
        path_of("gs://")
    with pytest.raises(UserError, match=r"^gs://b/texts: text needs a path on this machine$"):
        on_this_machine("gs://b/texts", "text")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^gs://b/run: buckets need another library: pip install gcsfs$"):
        path_of("gs://b/run")
