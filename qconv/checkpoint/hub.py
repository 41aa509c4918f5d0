"""From what the user typed, a folder: a local one, or a Hub id downloaded by huggingface_hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from qconv.boundary.content import head_of, instead_of_file, is_gguf_file
from qconv.boundary.printable import printable
from qconv.errors import CheckpointError, UsageError

_HUB_ID = re.compile(r"(?![^@]*(?:--|\.\.))\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?(@[\w./-]+)?", re.ASCII)
"""What the Hub's own client takes for one: another name raises an error of its own there."""
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenization_*.py", "merges.txt", "LICENSE*"]


def folder_name(path: Path) -> str:
    """What a model is called: its folder's name.

    Raises:
        UsageError: it is no UTF-8, or holds line ends or other characters that act instead of showing, so that no
            report, list of checksums or name of a file could hold it.
    """
    name = path.resolve().name
    if printable(name) != name:
        raise UsageError(
            f"{printable(str(path))}: the folder's name holds characters that no report can.",
            hint="Rename the folder.",
        )
    return name


def require_inside(folder: Path, file: Path) -> None:
    """Check that a file that will be published with a build is the model's, and no link to something else.

    Args:
        folder: The model's folder. If it is a snapshot of the Hub's cache, links into the cache's own blobs are fine.
        file: A file in it.

    Raises:
        CheckpointError: it leads elsewhere, or nowhere.
    """
    try:
        outside = outside_of(folder, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself, before Python 3.13
        raise CheckpointError(f"{file}: is a link that leads nowhere.", hint="Copy the file, or remove it.") from error
    if outside is None:
        return
    raise CheckpointError(
        f"{file}: is a link out of the model's folder, to {outside}, and its content would be published with the "
        "build.",
        hint="Copy the file into the folder, or remove it.",
    )


def outside_of(folder: Path, file: Path) -> Path | None:
    """Where a file lies, links followed, if that is neither in a folder nor where the Hub's cache keeps what it shows.

    Raises:
        OSError, RuntimeError: it leads nowhere.
    """
    root, target = folder.resolve(), file.resolve(strict=True)
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return None if target.is_relative_to(root) or target.is_relative_to(blobs) else target


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id: ``owner/name[@revision]``."""
    return _HUB_ID.fullmatch(name) is not None


def resolve_build(build: str) -> Path:
    """What may also be a GGUF file: that file, or the folder as of :func:`resolve_model`.

    Raises:
        UsageError: no such file, folder or Hub id.
        CheckpointError: the download failed.
    """
    path = Path(build)
    if is_gguf_file(path):
        if not os.path.exists(build):
            raise UsageError(f"{build}: no such file.", hint="Give a folder, a GGUF file or a Hub id.")
        return path
    return resolve_model(build)


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The folder of ``model``: itself if it is one, else the Hub snapshot of ``owner/name[@revision]``.

    Args:
        model: A folder or a Hub id.
        weights: Whether the shards are needed too; without, only config, index and tokenizer are downloaded.

    Raises:
        UsageError: neither a folder nor a Hub id.
        CheckpointError: the download failed.
    """
    if os.path.isdir(model):  # which says no, and raises nothing, where a name is none that a file system takes
        return Path(model)
    if os.path.exists(model):
        instead = instead_of_file(head_of(Path(model)))
        if instead is not None:
            raise UsageError(f"{model} is {instead.what}.", hint=instead.remedy)
        raise UsageError(f"{model} is a file.", hint="Give the folder that holds config.json.")
    if not is_hub_id(model):
        raise UsageError(f"{model}: no such folder.", hint="Give a folder or a Hub id such as Qwen/Qwen3-Coder-480B.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    patterns = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model}: no such folder here, and the download from the Hub failed: {error}.",
            hint="Check the spelling, the network and HF_TOKEN; a partial download is continued.",
        ) from error


@contextlib.contextmanager
def model_folder(model: str, disk_budget: int | None, log: Callable[[str], None]) -> Iterator[Path]:
    """The folder of a model whose weights are read, for as long as the body runs.

    Of a Hub id the shards come and go on a bounded disk if ``disk_budget`` says so, or if those that are not
    downloaded yet have no room here; else all are downloaded.

    Args:
        model: A folder or a Hub id.
        disk_budget: Bytes that shards may take.
        log: Told what comes and goes.

    Raises:
        UsageError: neither a folder nor a Hub id; a folder with a budget; too small a budget.
        CheckpointError: the Hub does not give it.
        OutputError: the disk is full.
    """
    remote = not os.path.exists(model) and is_hub_id(model)
    if not remote:
        if disk_budget is not None:
            raise UsageError(
                f"{model}: --disk-budget is for a model that comes from the Hub.",
                hint="Leave it out, or give a Hub id.",
            )
        yield resolve_model(model)
        return
    from qconv.checkpoint.hub_folder import default_root, hub_folder, roomy_budget
    from qconv.checkpoint.repository import Repository

    repository = Repository.open(model)
    budget = roomy_budget(repository) if disk_budget is None else disk_budget
    if budget is None:
        yield resolve_model(model)
        return
    with hub_folder(repository, budget, default_root(), _SMALL_FILES, log) as folder:
        yield folder


def least_disk_budget(model: str, folder: Path) -> int | None:
    """The least ``--disk-budget`` of a Hub id, in bytes; None for a folder, and where the Hub does not answer.

    Args:
        model: As on the command line.
        folder: What :func:`resolve_model` made of it: it holds the small files.
    """
    if os.path.exists(model) or not is_hub_id(model):
        return None
    from qconv.checkpoint.hub_folder import budget_needed
    from qconv.checkpoint.reader import read_weight_map
    from qconv.checkpoint.repository import Repository

    try:
        repository = Repository.open(model)
    except CheckpointError:  # its small files may be here all the same
        return None
    return budget_needed(repository, read_weight_map(folder) or {})


def headers_of(model: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a repository on the Hub, from the heads of its files alone.

    Args:
        model: ``owner/name[@revision]``.

    Raises:
        CheckpointError: the Hub cannot be reached, or the repository holds no safetensors.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    name, _, revision = model.partition("@")
    try:
        found = get_safetensors_metadata(name, revision=revision or None)
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError) as error:
        raise CheckpointError(
            f"{model}: the headers of its files cannot be read from the Hub: {error}.",
            hint="Check the spelling, the network and HF_TOKEN; or give a folder or a GGUF file.",
        ) from error
    return {
        tensor: (info.dtype, tuple(info.shape))
        for file in found.files_metadata.values()
        for tensor, info in file.tensors.items()
    }
