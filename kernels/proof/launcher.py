"""A launcher without a device: it compiles what the backend would compile and interprets the PTX."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kernels.proof.interpreter import memory_of, run
from kernels.proof.memory import Traffic
from kernels.proof.ptx import Function, parse
from qconv.runtime.backends.cuda.cache import cached_cubin
from qconv.runtime.backends.cuda.compiler import Source, compile_source
from qconv.runtime.backends.cuda.launch import Launch

CACHE = Path(__file__).parents[2] / "build" / "ptx"


@dataclass(slots=True)
class PtxLauncher:
    """Runs launches on tensors in the CPU's memory.

    Attributes:
        architecture: Whose PTX, compute capability times ten.
        multiprocessors: What the backend is to believe.
        launches: What ran, in order.
        traffic: Counts all launches' accesses to memory, if given.
    """

    architecture: int
    multiprocessors: int = 4
    launches: list[Launch] = field(default_factory=list)
    traffic: Traffic | None = None
    _modules: dict[int, dict[str, Function]] = field(default_factory=dict)

    def load(self, source: Source) -> None:
        """Compile a translation unit.

        Raises:
            BackendError: it does not compile.
            PtxError: what it compiles to is not understood.
        """
        if id(source) not in self._modules:
            ptx = cached_cubin(source, self.architecture, folder=CACHE, compile=partial(compile_source, output="ptx"))
            self._modules[id(source)] = parse(ptx.decode())

    def launch(self, launch: Launch) -> None:
        """Run one launch.

        Raises:
            PtxError: it does what is not defined.
        """
        self.load(launch.source)
        inputs = [memory_of(tensor) for tensor in launch.inputs.values()]
        for memory in inputs:
            memory.flags.writeable = False
        run(
            self._modules[id(launch.source)][launch.kernel],
            launch.grid,
            launch.threads,
            launch.shared_bytes,
            launch.arguments,
            [*inputs, memory_of(launch.output)],
            self.traffic,
        )
        self.launches.append(launch)
