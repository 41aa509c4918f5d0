"""A Hub repository as a folder whose shards come and go: what :meth:`Checkpoint.open` reads like any other.

Small files are downloaded whole. Of each shard a sparse stand-in holds the header and the pages that the fingerprint of
a local folder reads, so that plans are made before any shard comes, and a run may go from a window to a downloaded
folder and back.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import os
import re
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from qconv.checkpoint.header import MAX_HEADER_BYTES, TensorEntry, read_header
from qconv.checkpoint.reader import SINGLE_NAME, indexed_entries, read_weight_map
from qconv.checkpoint.repository import Repository
from qconv.checkpoint.samples import SAMPLE_BYTES, sampled_offsets
from qconv.checkpoint.window import PARTIAL, HubFolder, Shard, ShardWindow, least_budget
from qconv.errors import CheckpointError, OutputError, UsageError

CONNECTIONS = 16
"""Requests for pages of stand-ins at once."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_FIRST = ("embed_tokens", "wte", "word_embeddings")


def default_root() -> Path:
    """Where windows lie: ``$XDG_CACHE_HOME/qconv/hub``, by default ``~/.cache/qconv/hub``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qconv" / "hub"


def steps_of(weight_map: Mapping[str, str]) -> list[list[str]]:
    """The shards that each step of work reads, from the index: embeddings, each layer, the head and what is beside.

    Args:
        weight_map: Each tensor's shard.
    """
    found: dict[tuple[int, int], dict[str, None]] = {}
    for tensor, shard in weight_map.items():
        layer = _LAYER.search(tensor)
        first = layer is None and any(name in tensor for name in _FIRST)
        key = (1, int(layer[1])) if layer else (0, 0) if first else (2, 0)
        found.setdefault(key, {})[shard] = None
    return [sorted(found[key]) for key in sorted(found)]


def budget_needed(repository: Repository, weight_map: Mapping[str, str]) -> int:
    """The least ``--disk-budget``: bytes of shards that are needed at once; of the one file where there is no index."""
    weight_map = weight_map or {"": SINGLE_NAME}
    sizes = {shard: repository.files[shard].size for shard in set(weight_map.values()) if shard in repository.files}
    steps = [[shard for shard in step if shard in sizes] for step in steps_of(weight_map)]
    return least_budget(sizes, steps)


def roomy_budget(repository: Repository) -> int | None:
    """How much of the disk shards may take where what is not downloaded yet does not fit; None where it does."""
    from huggingface_hub import constants, try_to_load_from_cache

    missing = [
        file.size
        for name, file in repository.files.items()
        if name.endswith(".safetensors")
        and not isinstance(try_to_load_from_cache(repository.name, name, revision=repository.commit), str)
    ]
    if sum(missing) <= shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free:
        return None
    return shutil.disk_usage(_existing(default_root())).free // 2


def _existing(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.exists())


@contextlib.contextmanager
def hub_folder(
    repository: Repository, budget: int, root: Path, small: Sequence[str], log: Callable[[str], None]
) -> Iterator[HubFolder]:
    """A repository as a folder, for as long as the body runs; what is left is deleted when the body succeeds.

    Args:
        repository: Its files.
        budget: Bytes that its shards may take on the disk.
        root: Where its folder is made; a killed run's is found there again.
        small: Patterns of the names of the files that are downloaded whole.
        log: Told about what comes and goes.

    Raises:
        UsageError: the budget is too small, or another process uses the folder.
        CheckpointError: the Hub does not give a file, or what it gives is damaged.
        OutputError: the disk is full.
    """
    base = root / repository.name.replace("/", "--") / repository.commit
    folder = base / repository.name.rpartition("/")[2]
    for one in (folder, base / "samples", base / "shards"):
        one.mkdir(parents=True, exist_ok=True)
    with _alone(base):
        never = threading.Event()
        for name, file in repository.files.items():
            if "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in small):
                target = folder / name
                if not (target.is_file() and file.is_sound(target)):
                    repository.fetch(name, base / f"{name}{PARTIAL}", target, never)
        weight_map = read_weight_map(folder)
        names = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
        absent = [name for name in names if name not in repository.files]
        if absent:
            raise CheckpointError(
                f"{repository.name}: the repository holds no {absent[0]}.", hint="Is it a model of safetensors?"
            )
        log(f"{repository.name}: {len(names)} shards, of which at most {budget / 1e9:.2f} GB lie on the disk at once")
        _sample(repository, names, base / "samples")
        listed = weight_map or dict.fromkeys(read_header(base / "samples" / SINGLE_NAME), SINGLE_NAME)
        sizes = {name: repository.files[name].size for name in names}

        def bring(name: str, stopped: threading.Event) -> bool:
            path = base / "shards" / name
            came = repository.fetch(name, path.with_name(f"{name}{PARTIAL}"), path, stopped)
            if came:
                _require_same_samples(path, base / "samples" / name)
            return came

        with ShardWindow(base / "shards", sizes, steps_of(listed), budget, bring, log) as window:
            found = HubFolder(folder)
            found.window = window
            found.entries = _entries(repository, base, window, weight_map)
            yield found
        window.clear()


def _entries(
    repository: Repository, base: Path, window: ShardWindow, weight_map: Mapping[str, str] | None
) -> dict[str, TensorEntry]:
    """Every tensor by name, read off the stand-ins, each in its place in the window."""
    samples = base / "samples"
    known = read_header(samples / SINGLE_NAME) if weight_map is None else indexed_entries(samples, weight_map)
    shards: dict[str, Shard] = {}
    for name in {entry.file.name for entry in known.values()}:
        shards[name] = shard = Shard(base / "shards" / name)
        file = repository.files[name]
        shard.window, shard.samples, shard.seal = window, samples / name, file.sha256 or file.blob or ""
    return {name: replace(entry, file=shards[entry.file.name]) for name, entry in known.items()}


def _sample(repository: Repository, names: Sequence[str], folder: Path) -> None:
    """Make the stand-ins that are not there: a few small requests each."""

    def make(name: str) -> None:
        where, size = repository.locate(name), repository.files[name].size
        head = repository.part(name, 0, 8, where)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{repository.name}: {name} is no safetensors file.", hint="Report it to its owner.")
        temporary = folder / f"{name}{PARTIAL}"
        try:
            with temporary.open("wb") as file:
                file.write(head + repository.part(name, 8, length, where))
                file.truncate(size)
            pages = _pages(temporary)
            with temporary.open("r+b") as file:
                for offset in pages:
                    file.seek(offset)
                    file.write(repository.part(name, offset, SAMPLE_BYTES, where))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / name)
        except OSError as error:
            raise OutputError(f"{temporary}: {error.strerror}.", hint="Free some space.") from error

    missing = [name for name in names if not (folder / name).is_file()]
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="samples") as requests:
        for done in [requests.submit(make, name) for name in missing]:
            done.result()


def _pages(path: Path) -> range:
    """Where the sampled pages of a shard or a stand-in begin."""
    entries = read_header(path).values()
    end = max((entry.offset + entry.span for entry in entries), default=0)
    return sampled_offsets(min((entry.offset for entry in entries), default=0), end)


def _require_same_samples(path: Path, samples: Path) -> None:
    """Check that a shard, of which every byte is sound, is what its stand-in promised; remove both if not."""
    pages = _pages(samples)
    with path.open("rb") as ours, samples.open("rb") as theirs:
        same = ours.read(pages.start) == theirs.read(pages.start)
        for offset in pages:
            same = same and os.pread(ours.fileno(), SAMPLE_BYTES, offset) == os.pread(
                theirs.fileno(), SAMPLE_BYTES, offset
            )
    if not same:
        samples.unlink()
        path.unlink()
        raise CheckpointError(
            f"{path.name}: its header or a page of it was damaged on its way, before the file came whole.",
            hint="The same command asks for them again.",
        )


@contextlib.contextmanager
def _alone(base: Path) -> Iterator[None]:
    with (base / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{base}: another qconv reads this model through its own window.", hint="Wait, or set XDG_CACHE_HOME."
            ) from None
        yield
