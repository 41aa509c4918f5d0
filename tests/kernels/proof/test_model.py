"""The static model: hand-counted loops, occupancy by hand, and machine code of a kernel that is known."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from kernels.proof.chips import A100, B200, CHIPS, H100, L40S
from kernels.proof.model import Launched, estimate, frequencies, pipe_cycles, resident_blocks
from kernels.proof.sass import MachineCode, MachineInstruction, read_cubin, tools_folder
from qconv.errors import BackendError
from qconv.runtime.backends.cuda.compiler import Source, compile_source


def code(*opcodes: str | tuple[str, int], registers: int = 64) -> MachineCode:
    """Instructions 16 bytes apart; a pair is a branch and the index of its target."""
    instructions = []
    for index, each in enumerate(opcodes):
        opcode, target = (each, None) if isinstance(each, str) else (each[0], 16 * each[1])
        instructions.append(MachineInstruction(16 * index, opcode, target))
    return MachineCode("k", registers, 0, tuple(instructions))


def test_occupancy_is_limited_by_each_resource() -> None:
    assert resident_blocks(A100, 32, 128, 0) == 16  # 64 warps
    assert resident_blocks(A100, 128, 128, 0) == 4  # 65536 / (128 * 128)
    assert resident_blocks(A100, 129, 128, 0) == 3  # registers come in units of 8 a thread
    assert resident_blocks(A100, 112, 64, 0) == 8  # four warps a quarter, where four times as many registers fit nine
    assert resident_blocks(A100, 32, 128, 40 << 10) == 4  # 164 KiB, and 1 KiB of the system's for each block
    assert resident_blocks(L40S, 32, 32, 0) == 24  # blocks


def test_the_main_loop_is_the_one_with_the_work() -> None:
    loop = code("IADD3", ("BRA", 0), "LDS.128", "HMMA.16816.F32", "HMMA.16816.F32", ("BRA", 2), "FADD", ("BRA", 6))
    assert [each.opcode for each in loop.main_loop()] == ["LDS.128", "HMMA.16816.F32", "HMMA.16816.F32", "BRA"]
    assert code("IADD3", "EXIT").main_loop() == ()


def test_pipes_of_a_loop_counted_by_hand() -> None:
    loop = code(
        "LDS.128", "LDSM.16.M88.4", "LOP3.LUT", "IMAD.WIDE", "FFMA", "HFMA2", "HMMA.16816.F32", ("BRA", 0)
    ).main_loop()
    cycles = pipe_cycles(loop, A100)
    assert cycles["issue"] == 8
    assert cycles["memory"] == 4 * (4 + 4)  # 512 bytes a warp each, 128 a cycle for all four quarters
    assert cycles["integer"] == 2  # 64 lanes an SM: 16 a quarter
    assert cycles["float"] == 2 + 2
    assert cycles["half"] == 1
    assert cycles["tensor"] == 8
    assert pipe_cycles(loop, L40S)["float"] == 2 + 1


def test_two_sums_in_one_instruction_cost_one_slot_and_the_lanes_of_two() -> None:
    cycles = pipe_cycles(code("FFMA2", "HMMA.16816.F32", ("BRA", 0)).main_loop(), B200)
    assert cycles["issue"] == 3
    assert cycles["float"] == 2  # 64 multiply-adds a warp, 32 lanes a quarter


def test_what_a_branch_skips_counts_for_its_share() -> None:
    loop = code(
        "HMMA.16816.F32", ("BRA", 4), "LDGSTS.E.128", "IADD3",  # copies always run
        ("BRA", 10), "LDS", ("BRA", 8), "PRMT", ("BRA", 10), "SHF",  # parameters: two alternatives inside
        ("BRA", 0),
    ).main_loop()  # fmt: skip
    assert frequencies(loop, 0.25) == [1, 1, 1, 1, 1, 0.25, 0.25, 0.125, 0.25, 0.125, 1]


def test_a_loop_with_a_barrier_counts_the_one_in_it_as_often_as_it_runs() -> None:
    loop = code("BAR.SYNC", "LDS", "HMMA.16816.F32", ("BRA", 1), "IADD3", ("BRA", 0)).main_loop()
    assert len(loop) == 6
    assert frequencies(loop, 1.0, 2) == [1, 2, 2, 2, 1, 1]
    assert pipe_cycles(loop, A100, 1.0, 2)["tensor"] == 16


def test_share_of_bandwidth() -> None:
    # 100 issue slots a pass and warp, four warps: an SM makes clock / 100 passes a second.
    loop = code(*["NOP"] * 98, "HMMA.16816.F32", ("BRA", 0))
    launched = Launched(threads=128, shared_bytes=1 << 10, pass_bytes=1024, flight_bytes=64 << 10)
    answer = estimate(loop, launched, H100)
    assert answer.pipe_bandwidth == pytest.approx(1024 * 132 * 1.755e9 / 100)
    assert answer.share == pytest.approx(answer.pipe_bandwidth / 3.35e12)
    assert answer.bound == "issue"
    starved = estimate(loop, Launched(128, 100 << 10, 1 << 20, 1 << 10), H100)
    assert starved.flight_bandwidth == pytest.approx(2 * 1024 * 132 / 800e-9)
    assert starved.bound == "latency"


SOURCE = Source("k.cu", """
extern "C" __global__ void __launch_bounds__(128) loop(float* p, int n) {
  float a = 0;
  for (int i = 0; i < n; i++) a = a * p[i] + 1.5f;
  p[threadIdx.x] = a;
}
extern "C" __global__ void __launch_bounds__(1024, 1) crowded(float* p, int n) {
  float a[160];
  for (int i = 0; i < 160; i++) a[i] = p[i * n];
  for (int j = 0; j < n; j++)
    for (int i = 0; i < 160; i++) a[i] = a[i] * p[j] + a[159 - i];
  for (int i = 0; i < 160; i++) p[i * n + threadIdx.x] = a[i];
}
""")  # fmt: skip


@pytest.mark.parametrize("architecture", CHIPS)
def test_machine_code_is_read_as_it_is(architecture: int) -> None:
    codes = read_cubin(compile_source(SOURCE, architecture))
    assert set(codes) == {"loop", "crowded"}
    plain, crowded = codes["loop"], codes["crowded"]
    assert plain.stack_bytes == 0
    assert 8 <= plain.registers <= 40
    assert plain.mix()["EXIT"] >= 1
    assert sum(each.mnemonic in ("FFMA", "FFMA2") for each in plain.main_loop()) >= 1
    # 1024 threads leave 64 registers each: 160 sums cannot stay in them.
    assert crowded.registers <= 64
    assert crowded.stack_bytes > 0


def test_the_tools_are_where_their_packages_put_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BackendError, match="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"):
        tools_folder.__wrapped__()
