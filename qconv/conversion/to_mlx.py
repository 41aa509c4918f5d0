"""A build in MLX's layout: codes as they are in other words, the experts of a layer in one tensor."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv import __version__
from qconv.artifacts.build import with_both_spellings
from qconv.artifacts.source import Source
from qconv.artifacts.verbatim import not_taken, parts_of
from qconv.building.completion import already_complete
from qconv.building.gguf_report import left_out_values
from qconv.building.inputs import fingerprints, lasting
from qconv.building.output import Outcome, complete_files, require_published
from qconv.building.target import LayerSink, Log, Means
from qconv.calibration.corpus import TokenSet
from qconv.calibration.layer import LayerBuild
from qconv.checkpoint.header import TensorSpec
from qconv.checkpoint.reader import INDEX_NAME
from qconv.checkpoint.writer import ShardWriter, sha256_of
from qconv.conversion import mlx
from qconv.conversion.mlx import Mode
from qconv.conversion.target import CONVERTED, KEPT, converted_from
from qconv.conversion.weights import CodedWeights
from qconv.core.architecture import Layer, Linear
from qconv.core.qtensor import Grid
from qconv.core.settings import GIGABYTE, CalibrationSettings
from qconv.core.workers import Workers
from qconv.errors import UsageError, VerificationError
from qconv.folders.part import Part
from qconv.folders.readings import READ, checksum
from qconv.folders.state import REPORT_NAME
from qconv.planning.costs import Demand, demand_of_passing
from qconv.planning.engines import engine_values, judged_as_it_is

_FRAMEWORK = "mlx"


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """Tensors of the checkpoint that become those of one module of mlx-lm's.

    Attributes:
        name: Its name there; of what is plain, the tensor's.
        sources: The checkpoint's tensors: one, or an expert's each.
        mode: How codes are to be read; None of plain tensors.
        specs: What becomes of them, in file order.
    """

    name: str
    sources: tuple[str, ...]
    mode: Mode | None
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(spec.nbytes for spec in self.specs)


def stacks(weights: CodedWeights) -> tuple[list[Stack], dict[str, str]]:
    """All of a model in file order, and the linears that mlx does not hold, each with why.

    Raises:
        UsageError: how mlx-lm stores the model is not known.
    """
    mlx.require_known(weights.architecture)
    again: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for name, _ in weights.architecture.tensors():
        module, _, leaf = name.rpartition(".")
        called, _ = mlx.stacked(module)
        found.setdefault(f"{called}.{leaf}", []).append(name)
    made = []
    for called, sources in found.items():
        linears = [weights.linears[name] for name in sources if name in weights.linears]
        modes = {linear.name: _mode(weights, linear) for linear in linears}
        refused = {name: mode for name, mode in modes.items() if isinstance(mode, str)}
        if not refused and (len({*modes.values()}) > 1 or len(linears) not in (0, len(sources))):
            refused = dict.fromkeys(modes, "the experts of a layer are on several grids")
        again |= refused
        mode = next((one for one in modes.values() if isinstance(one, Mode)), None)
        made.append(_stack(weights, called, sources, None if refused else mode))
    return made, again


def _mode(weights: CodedWeights, linear: Linear) -> Mode | str:
    grid = weights.grid_of(linear)
    if isinstance(grid, str):
        return grid
    mode = mlx.mode_of(grid, linear.in_features)
    if isinstance(mode, str):
        return mode
    return mlx.misfit(weights.qtensor(linear.weight)) or mode


def _stack(weights: CodedWeights, called: str, sources: list[str], mode: Mode | None) -> Stack:
    entry = weights.entry(sources[0])
    expert = mlx.stacked(sources[0].rpartition(".")[0])[1] is not None
    outer = (len(sources),) if expert else ()
    if mode is None:
        spec = TensorSpec(called, entry.dtype, (*outer, *entry.shape))
        return Stack(called, tuple(sources), None, (spec,))
    rows, columns = entry.shape
    module = called.rpartition(".")[0]
    grid = weights.grid_of(weights.linears[sources[0]])
    assert isinstance(grid, Grid)
    scale = grid.scale_dtype if mode.name == "affine" else torch.uint8
    groups = (*outer, rows, columns // mode.group_size)
    specs = [
        TensorSpec(f"{module}.weight", torch.uint32, (*outer, rows, columns * mode.bits // 32)),
        TensorSpec(f"{module}.scales", scale, groups),
    ]
    if mode.name == "affine":
        specs.append(TensorSpec(f"{module}.biases", scale, groups))
    return Stack(module, tuple(sources), mode, tuple(specs))


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """A file."""

    name: str
    stacks: tuple[Stack, ...]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(stack.nbytes for stack in self.stacks)


def mlx_target(source: Source, out: Path, shard_bytes: int | None, requantize: bool, log: Log) -> MlxTarget:
    """The target of a conversion.

    Raises:
        UsageError: mlx does not hold the build's numbers, or how it stores the model is not known.
    """
    weights = _weights(source)
    made, again = stacks(weights)
    if again:
        first, reason = next(iter(again.items()))
        more = f" and {len(again) - 1} more" if len(again) > 1 else ""
        raise UsageError(
            f"--to mlx: {len(again)} linears have no place there: {first}{more} ({reason}). Nothing was written.",
            hint="Quantize the model with --fmt w4a16 --group-size 64, whose numbers mlx holds"
            + ("; --to mlx rounds nothing again." if requantize else "."),
        )
    grids = [grid for grid in map(weights.grid_of, weights.linears.values()) if isinstance(grid, Grid)]
    if any(grid.activations != "none" for grid in grids):
        log("inputs, which other engines round token by token, stay as they are in mlx")
    if source.verbatim:
        log(not_taken(parts_of(source.verbatim)))
    limit = shard_bytes or 5 * GIGABYTE
    groups: list[list[Stack]] = [[]]
    for one in made:
        if groups[-1] and sum(stack.nbytes for stack in groups[-1]) + one.nbytes > limit:
            groups.append([])
        groups[-1].append(one)
    count = len(groups)
    shards = [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group)) for number, group in enumerate(groups, 1)
    ]
    return MlxTarget(source, out, tuple(shards))


@dataclasses.dataclass(frozen=True, slots=True)
class MlxTarget:
    """See :class:`qconv.building.target.Target`."""

    source: Source
    folder: Path
    shards: tuple[Shard, ...]
    name: str = ""
    share: None = None

    @property
    def weights(self) -> int:
        """Those of the model."""
        return sum(math.prod(shape) for _, shape in self.source.architecture.tensors())

    @property
    def calibration(self) -> CalibrationSettings | None:
        """Layers are not looked at."""
        return None

    @property
    def calibrates(self) -> bool:
        """Nothing is rounded."""
        return False

    @property
    def demand(self) -> Demand:
        """Of a few weights."""
        return demand_of_passing(self.source.architecture)

    def allowance(self, workers: int) -> float:
        """No bound: one weight after the other is written."""
        return math.inf

    def names(self) -> list[str]:
        """Every file that gets a name."""
        return [shard.name for shard in self.shards] + [*self.source.named_companions(), *_OWN]

    def fingerprints(self, tokens: TokenSet | None) -> dict[str, str]:
        """What the build belongs to: the one that it is converted from, and what is asked for."""
        asked = f"mlx {[shard.nbytes for shard in self.shards]}"
        return fingerprints(self.source, asked, None, adds_up=False, companions="copied")

    def check(self, means: Means) -> None:
        """Was done before."""

    def needed(self, committed: Collection[str], work: Path) -> int:
        """Bytes of the files that are not committed."""
        return sum(shard.nbytes for shard in self.shards if shard.name not in committed)

    def looks_again(self, committed: Collection[str]) -> bool:
        """Never."""
        return False

    def readings(self, workers: Workers) -> dict[str, Callable[[], str]]:
        """By file what reads its part of the build again."""
        return {shard.name: partial(self.read_again, shard, workers) for shard in self.shards}

    def read_again(self, shard: Shard, workers: Workers) -> str:
        """The checksum of what a file is made of."""
        names = (name for stack in shard.stacks for name in stack.sources)
        return checksum(self.source.checkpoint, names, workers)

    def standing(self, committed: Collection[str]) -> str:
        """How many files are committed."""
        return f"{sum(shard.name in committed for shard in self.shards)} of {len(self.shards)} files are committed"

    def complete(self, belongs: Mapping[str, str], means: Means) -> Outcome:
        """The finished build."""
        files = [shard.name for shard in self.shards]
        return already_complete(self.folder, belongs, files, means.workers, means.progress)

    def begin(
        self,
        part: Part,
        tokens: TokenSet | None,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> MlxWriter:
        """Go to work."""
        return MlxWriter(self, part, belongs, means, show)


_OWN = ("config.json", INDEX_NAME, "README.md", REPORT_NAME)


class MlxWriter:
    """See :class:`qconv.building.target.Writer`."""

    def __init__(
        self,
        target: MlxTarget,
        part: Part,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> None:
        """See :meth:`MlxTarget.begin`."""
        self.target, self.out, self.source = target, target.folder, target.source
        self.weights = _weights(target.source)
        self.part, self.belongs, self.means, self.show = part, belongs, means, show
        self.done = 0

    def pending(self, layer: Layer) -> bool:
        """Never."""
        return False

    def doing(self, layer: Layer) -> str:
        """Nothing."""
        return ""

    def build(self, layer: Layer) -> LayerBuild | None:
        """Nothing."""
        return None

    def sink(self, layer: Layer) -> LayerSink:
        """None: no layer is looked at."""
        raise NotImplementedError

    def before_layers(self) -> None:
        """All files."""
        for shard in self.target.shards:
            self._file(shard)

    def after_layer(self, layer: Layer) -> None:
        """Nothing."""

    def after_layers(self) -> None:
        """Nothing."""

    def settle(self) -> None:
        """Nothing is handed over that is not safe."""

    def _file(self, shard: Shard) -> None:
        self.show(shard.name)
        committed = self.part.units.get(shard.name)
        if committed is not None:
            require_published(self.out / shard.name, committed["size"])
            self.done += sum(self._count(stack) for stack in shard.stacks)
            return
        read = self.target.read_again(shard, self.means.workers)
        specs = [spec for stack in shard.stacks for spec in stack.specs]
        path = self.out / shard.name
        with ShardWriter(path, specs, self.part.staged(shard.name), _FRAMEWORK) as writer:
            for stack in shard.stacks:
                for spec in stack.specs:
                    writer.write_blocks(spec.name, self._blocks(stack, spec))
                self.done += self._count(stack)
                self.show(stack.name)
            written = writer.finish()
            self.part.announce([written])
            writer.publish()
        self.part.commit(shard.name, {"size": written.size, "sha256": written.sha256, READ: read})

    def _count(self, stack: Stack) -> int:
        return sum(math.prod(self.weights.entry(name).shape) for name in stack.sources)

    def _blocks(self, stack: Stack, spec: TensorSpec) -> Iterator[Tensor]:
        """A tensor's bytes, an expert at a time.

        Raises:
            VerificationError: what it stands for are other numbers than before.
        """
        for name in stack.sources:
            if stack.mode is None:
                blocks = self.weights.blocks(name)
                yield from (block.unsqueeze(0) if len(spec.shape) > block.dim() else block for block in blocks)
                continue
            weight = self.weights.qtensor(name)
            found = mlx.pieces(weight, stack.mode)
            leaf = spec.name.rpartition(".")[2]
            if leaf == "weight" and not torch.equal(mlx.dense(found, stack.mode), weight.dequantize()):
                raise VerificationError(
                    f"{name}: dequantizes to other numbers than before.",
                    hint="This is a bug; the build that it was converted from is whole.",
                )
            piece = found[leaf]
            yield piece.unsqueeze(0) if len(spec.shape) > piece.dim() else piece

    def finish(self) -> Outcome:
        """Complete the folder."""
        report, files = self._report(), [shard.name for shard in self.target.shards]
        weight_map = {
            spec.name: shard.name for shard in self.target.shards for stack in shard.stacks for spec in stack.specs
        }
        size = sum(shard.nbytes for shard in self.target.shards)
        small = {
            "config.json": _json(self._config()),
            INDEX_NAME: _json({"metadata": {"total_size": size}, "weight_map": weight_map}),
            "README.md": _card(report).encode(),
            **{name: file.read_bytes() for name, file in self.source.named_companions().items()},
            REPORT_NAME: _json(report),
        }
        complete_files(self.out, self.part, small, files, self._digests)
        return Outcome(self.out, report | self._engines(), already_complete=False)

    def _digests(self, names: list[str]) -> Iterator[str]:
        return self.means.workers.map(lambda name: sha256_of(self.out / name), names)

    def _config(self) -> dict[str, Any]:
        """config.json: the mode that most modules have, and each other's by its name."""
        modes = {stack.name: stack.mode for shard in self.target.shards for stack in shard.stacks if stack.mode}
        found = list(modes.values())
        most = max(dict.fromkeys(found), key=found.count)
        section: dict[str, Any] = {**most.section()}
        section |= {name: mode.section() for name, mode in modes.items() if mode != most}
        return {**with_both_spellings(self.weights.config), "quantization": section, "quantization_config": section}

    def _report(self) -> dict[str, Any]:
        before = self.weights
        said, weights = before.report(), self.target.weights
        size = sum(shard.nbytes for shard in self.target.shards)
        return {
            **{key: said[key] for key in KEPT if key in said},
            "qconv": __version__,
            "source": said.get("source", self.source.name),
            "format": "mlx",
            "fingerprints": lasting(self.belongs),
            "recipe": {**said.get("recipe", {}), "format": "mlx"},
            "bits_per_weight": round(8.0 * size / weights, 4),
            "parameters": weights,
            "files": [shard.name for shard in self.target.shards],
            "layers": said.get("layers", []),
            **left_out_values(self.source.verbatim),
            CONVERTED: converted_from(before, {}),
        }

    def _engines(self) -> dict[str, Any]:
        return {"engines": engine_values(judged_as_it_is(self.out))}


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _card(report: Mapping[str, Any]) -> str:
    source = report["source"].replace("\n", " ")
    return (
        f"---\nbase_model: {json.dumps(source)}\nlibrary_name: mlx\ntags: [mlx, qconv]\n---\n\n# {source}, mlx\n\n"
        f"Converted with qconv {report['qconv']} from {report[CONVERTED]['from']}, code by code: every weight is the "
        f"same number. {report['bits_per_weight']:.2f} bits per weight over all {report['parameters']:,} parameters."
        "\n\n"
        "`mlx_lm.generate --model .` runs it; `sha256sum -c SHA256SUMS` checks the files.\n"
    )


def _weights(source: Source) -> CodedWeights:
    assert isinstance(source.checkpoint, CodedWeights)
    return source.checkpoint
