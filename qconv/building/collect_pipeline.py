"""``qconv collect``: a build of the shares that several machines have made."""

from __future__ import annotations

from pathlib import Path

from qconv.building.gguf_pipeline import gguf_target
from qconv.building.gguf_target import GgufTarget
from qconv.building.joining import Shares
from qconv.building.output import Outcome
from qconv.building.pipeline import open_source, safetensors_target
from qconv.building.run import make_builds
from qconv.building.safetensors_target import SafetensorsTarget
from qconv.building.share import REQUEST_NAME
from qconv.building.target import Log
from qconv.errors import ArtifactError, UsageError
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.planning.recipe import parse_recipe
from qconv.verification.outcome import Progress


def collect(
    out: Path, model: Path | None = None, *, threads: int | None = None, progress: Progress, log: Log
) -> Outcome | None:
    """Make a build of its shares; where a share came from makes no difference.

    Args:
        out: The build's folder, beside which the shares lie.
        model: The model, where it is not where the first share found it.
        threads: Files whose checksums are computed at once.
        progress: Told what is at work, the weights done and the weights in all.
        log: Told about decisions, one sentence each.

    Returns:
        None where the build is finished and its shares are gone.

    Raises:
        UsageError: a share is missing or not finished.
        StaleJournalError: a share was made from other inputs.
        ArtifactError: a share's request is damaged.
        VerificationError: a file is not what it was when it was committed, or all together are not the model.
        OutputError: a share is still being made; the folder is foreign, in use, or cannot be written.
    """
    shares = Shares.find(out)
    if shares is None:
        return None
    request, where = shares.request, f"{shares.folders[0]}: {REQUEST_NAME}"
    path = model if model is not None else request.get("model")
    if path is None:
        raise UsageError(f"{where}: its model came through a window.", hint="Name the model with --model.")
    if not isinstance(path, (str, Path)) or not isinstance(request.get("recipe"), dict):
        raise ArtifactError(f"{where} is damaged.", hint="Make the part again with --restart.")
    source = open_source(Path(path), out, log)
    target: SafetensorsTarget | GgufTarget
    if request.get("gguf"):
        target = gguf_target(source, parse_gguf_recipe(request["recipe"], where), out, "", log)
    else:
        target = safetensors_target(source, parse_recipe(request["recipe"], where), out, "", log)
    shares.hand_over(target, target.fingerprints(None))
    log(f"collected {len(shares.folders)} parts")
    outcome = make_builds(source, [target], out, restart=False, threads=threads, progress=progress, log=log)[0]
    shares.remove()
    return outcome
