"""Files and folders here or at a URL, written so that a killed process leaves either the old bytes or the new ones."""

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from electrax.config import AnyPath, UserError

log = logging.getLogger("electrax")
BUCKETS = "gs://"
_reached: set[str] = set()


def path_of(name: str | os.PathLike) -> AnyPath:
    """A file or folder of this machine, or for gs://BUCKET/… etils' path, which has the methods of pathlib that the
    package uses. UserError for another scheme, for a bucket that can't be reached, and where the library is missing."""
    text = os.fspath(name)
    scheme, mark, rest = text.partition("://")
    if not mark or "/" in scheme:
        return Path(text)
    if not text.startswith(BUCKETS) or not rest.strip("/"):
        raise UserError(f"{text}: expected a path, or {BUCKETS}BUCKET/…")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: buckets need another library: pip install gcsfs")
    import fsspec.config
    from etils import epath

    # other processes write there, and orbax past this library: what it remembered of a folder would be wrong
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    # it warns at each call of who may not ask for a bucket's kind, and shows the trace of what it raises
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    path = epath.Path(text)
    bucket = text.split("/")[2]
    if bucket not in _reached:
        try:
            path.exists()
        except Exception as error:  # of the libraries for the network, for credentials and for HTTP
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{text}: cannot be reached: {reason}") from error
        _reached.add(bucket)
    return path  # pyright: ignore[reportReturnType]


def is_remote(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(BUCKETS)


def on_this_machine(name: str | os.PathLike, what: str = "this") -> Path:
    """A path. UserError for a URL, from which `what` is not read, or to which it is not written."""
    if "://" in os.fspath(name):
        raise UserError(f"{os.fspath(name)}: {what} needs a path on this machine")
    return Path(name)


def absolute(path: AnyPath) -> AnyPath:
    """From the root on, as a bucket's always is."""
    return path if is_remote(path) else path.absolute()


def make_folder(path: AnyPath) -> None:
    """With those above it, for its user alone. In a bucket it comes with its first file."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)


def remove_folder(path: AnyPath) -> None:
    """With all that is in it; nothing where there is none."""
    if is_remote(path):
        path.rmtree(missing_ok=True)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        shutil.rmtree(path, ignore_errors=True)


def files_below(folder: AnyPath) -> dict[str, AnyPath]:
    """The files of a folder and of those in it, by their names relative to it, in order."""
    if is_remote(folder):
        bucket = os.fspath(folder).removeprefix(BUCKETS)
        names = []
        for root, _, files in folder.walk():  # pyright: ignore[reportAttributeAccessIssue]
            inner = os.path.relpath(os.fspath(root).removeprefix(BUCKETS), bucket)  # etils leaves the scheme away
            names += [os.path.normpath(f"{inner}/{file}") for file in files]
    else:
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return {name: folder / name for name in sorted(names)}


def file_sha256(path: AnyPath) -> str:
    """The hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: AnyPath, content: str | bytes) -> None:
    """Replace a file, all or nothing."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)  # an object is there when all of it is
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a link that somebody left there must not be followed
    with open(temporary, "xb", buffering=0) as file:
        write_all(file, data)
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


class Mirror:
    """A folder of this machine, whose files are copied into one of a bucket: objects can't be appended to. It begins
    with `names` of what is there."""

    def __init__(self, remote: AnyPath, names: Sequence[str] = (), seconds: float = 10.0):
        self._remote, self._seconds, self._copied = remote, seconds, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="electrax-"))
        for name in names:
            if (remote / name).is_file():
                (self.folder / name).write_bytes((remote / name).read_bytes())

    def copy(self, now: bool = False) -> bool:
        """Copies all files, if some seconds are over since the last time, or `now`; whether they could be copied. What
        is only told must not end a run: where the bucket fails, the next call tries again."""
        if not now and time.monotonic() - self._copied < self._seconds:
            return True
        self._copied = time.monotonic()
        try:
            for name, path in files_below(self.folder).items():
                write_atomically(self._remote / name, path.read_bytes())
        except Exception as error:  # of the libraries for the network, for credentials and for HTTP
            log.warning("%s: cannot be written: %s", self._remote, error)
            return False
        return True

    def close(self) -> None:
        """Copies them for the last time, and removes the folder; one that could not be copied stays."""
        if self.copy(now=True):
            shutil.rmtree(self.folder)
        else:
            log.warning("%s: what was to be written there is in %s", self._remote, self.folder)


def write_all(file: io.FileIO, data: bytes) -> None:
    """Into a file without a buffer, which may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def sync_directory(path: Path) -> None:
    """Make the names in a directory last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def own_folder(path: Path) -> Path:
    """A folder that its user alone can enter, made where there is none. UserError where the one that is there belongs
    to somebody else or can be written by others, who could have put anything into it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        whose = "belongs to another user" if found.st_uid != os.geteuid() else "can be written by others"
        raise UserError(f"{path}: {whose}; expected a folder of your own (chmod 700, or another XDG_CACHE_HOME)")
    return path


def cache_folder() -> Path:
    """The user's cache directory for electrax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "electrax"


def own_cache(kind: str) -> Path:
    """The folder of one kind of thing in the user's cache. UserError where others could have put something there:
    programs and weights are taken from it."""
    return own_folder(own_folder(cache_folder()) / kind)


@contextlib.contextmanager
def locked(directory: AnyPath, work: str) -> Iterator[None]:
    """Two runs in one directory would spoil each other's files: the second gets a UserError that names the `work`.
    Nothing of the kind keeps a second one out of a bucket."""
    if is_remote(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{directory}: another {work} is at work in it") from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, for its user alone, which becomes `path` when all is written. UserError where
    something is there, and for whatever the system refuses meanwhile."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is there already; expected a new or empty directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o700
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            made.chmod(mode)
            yield made
            os.replace(made, path)
            sync_directory(path.parent)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None
