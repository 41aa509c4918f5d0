"""The PTX interpreter against Python's own arithmetic, one instruction at a time; and what it must refuse."""

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest

from kernels.proof.interpreter import run
from kernels.proof.ptx import PtxError, parse
from kernels.proof.semantics import Array, bf16_bits

MASK = 0xFFFFFFFF
WORDS = [
    0,
    1,
    2,
    31,
    32,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x12345678,
    0xDEADBEEF,
]
"""Edges of every width, and words without pattern."""


def module(body: str, declarations: str = "", shared: str = ".extern .shared .align 1024 .b8 pool[];") -> str:
    """A module with one kernel that takes two pointers, in %rd1 and %rd2, and has its thread's number in %r1."""
    return f"""
    .version 8.0
    .target sm_80
    .address_size 64
    {shared}
    .visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
    {{
        .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %rd<99>;
        {declarations}
        ld.param.u64 %rd1, [kernel_param_0];
        ld.param.u64 %rd2, [kernel_param_1];
        mov.u32 %r1, %tid.x;
        {body}
        ret;
    }}
    """


def launch(text: str, inputs: Array, outputs: Array, *, blocks: int = 1, threads: int = 32, shared: int = 0) -> int:
    function = parse(text)["kernel"]
    arguments = struct.pack("2Q", inputs.ctypes.data, outputs.ctypes.data)
    buffers = [array.reshape(-1).view(np.uint8) for array in (inputs, outputs)]
    return run(function, (blocks, 1, 1), threads, shared, arguments, buffers)


def evaluate(instruction: str, *operands: list[int]) -> list[int]:
    """The 32-bit results of ``instruction`` (on %r11, %r12, %r13, into %r10) for rows of operands."""
    rows = np.zeros((-(-len(operands[0]) // 32) * 32, 3), np.uint32)
    for column, values in enumerate(operands):
        rows[: len(values), column] = values
    outputs = np.zeros(len(rows), np.uint32)
    body = f"""
        mad.wide.u32 %rd3, %r1, 12, %rd1;
        mad.wide.u32 %rd4, %r1, 4, %rd2;
        ld.global.u32 %r11, [%rd3]; ld.global.u32 %r12, [%rd3+4]; ld.global.u32 %r13, [%rd3+8];
        {instruction}
        st.global.u32 [%rd4], %r10;
    """
    launch(module(body), rows, outputs, threads=len(rows))
    return [int(value) for value in outputs[: len(operands[0])]]


def pairs() -> tuple[list[int], list[int]]:
    """Every pair of WORDS."""
    return [a for a in WORDS for _ in WORDS], [b for _ in WORDS for b in WORDS]


def signed(word: int, bits: int = 32) -> int:
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def quotient(a: int, b: int) -> int:
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


Binary = Callable[[int, int], int]
BINARY: dict[str, Binary] = {
    "add.s32 %r10, %r11, %r12;": lambda a, b: a + b,
    "sub.s32 %r10, %r11, %r12;": lambda a, b: a - b,
    "mul.lo.s32 %r10, %r11, %r12;": lambda a, b: a * b,
    "mul.hi.u32 %r10, %r11, %r12;": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r10, %r11, %r12;": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.wide.s32 %rd9, %r11, %r12; shr.u64 %rd9, %rd9, 16; cvt.u32.u64 %r10, %rd9;": lambda a, b: (
        signed(a) * signed(b) >> 16
    ),
    "mad.lo.s32 %r10, %r11, %r12, %r11;": lambda a, b: a * b + a,
    "and.b32 %r10, %r11, %r12;": lambda a, b: a & b,
    "or.b32 %r10, %r11, %r12;": lambda a, b: a | b,
    "xor.b32 %r10, %r11, %r12;": lambda a, b: a ^ b,
    "shl.b32 %r10, %r11, %r12;": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 %r10, %r11, %r12;": lambda a, b: a >> min(b, 32),
    "shr.s32 %r10, %r11, %r12;": lambda a, b: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r10, %r11, %r12, 5;": lambda a, b: (b << 32 | a) << 5 >> 32,
    "shf.r.wrap.b32 %r10, %r11, %r12, %r11;": lambda a, b: (b << 32 | a) >> (a & 31),
    "min.s32 %r10, %r11, %r12;": lambda a, b: min(signed(a), signed(b)),
    "max.u32 %r10, %r11, %r12;": max,
    "div.s32 %r10, %r11, %r12;": lambda a, b: quotient(signed(a), signed(b)) if b else 0,
    "div.u32 %r10, %r11, %r12;": lambda a, b: a // b if b else 0,
    "rem.u32 %r10, %r11, %r12;": lambda a, b: a % b if b else 0,
    "lop3.b32 %r10, %r11, %r12, 0xff00ff, 0xEA;": lambda a, b: a & b | 0xFF00FF,
    "lop3.b32 %r10, %r11, %r12, 0x0f0f0f0f, 0x96;": lambda a, b: a ^ b ^ 0x0F0F0F0F,
    "prmt.b32 %r10, %r11, %r12, 0x5410;": lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16,
    "prmt.b32 %r10, %r11, %r12, 0x8000;": lambda a, b: (a & 0xFF) * 0x010101 | (0xFF000000 if a & 0x80 else 0),
    "bfi.b32 %r10, %r11, %r12, 8, 16;": lambda a, b: b & 0xFF0000FF | (a & 0xFFFF) << 8,
    "bfe.u32 %r10, %r11, 4, 12;": lambda a, b: a >> 4 & 0xFFF,
    "bfe.s32 %r10, %r11, 4, 12;": lambda a, b: signed(a >> 4, 12),
    "setp.lt.s32 %p1, %r11, %r12; selp.b32 %r10, 5, 7, %p1;": lambda a, b: 5 if signed(a) < signed(b) else 7,
    "setp.gt.u32 %p1, %r11, %r12; @!%p1 mov.u32 %r10, 3; @%p1 mov.u32 %r10, 4;": lambda a, b: 4 if a > b else 3,
    "neg.s32 %r10, %r11;": lambda a, b: -a,
    "not.b32 %r10, %r11;": lambda a, b: ~a,
    "popc.b32 %r10, %r11;": lambda a, b: a.bit_count(),
    "clz.b32 %r10, %r11;": lambda a, b: 32 - a.bit_length(),
    "brev.b32 %r10, %r11;": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "cvt.s32.s8 %r10, %r11;": lambda a, b: signed(a, 8),
    "cvt.u16.u32 %rs1, %r11; cvt.u32.u16 %r10, %rs1;": lambda a, b: a & 0xFFFF,
    "cvt.s64.s32 %rd9, %r11; shr.s64 %rd9, %rd9, 33; cvt.u32.u64 %r10, %rd9;": lambda a, b: signed(a) >> 33,
    "mov.b32 {%rs1, %rs2}, %r11; mov.b32 %r10, {%rs2, %rs1};": lambda a, b: a >> 16 | (a & 0xFFFF) << 16,
    "mov.b64 %rd9, {%r11, %r12}; mov.b64 {%r9, %r10}, %rd9;": lambda a, b: b,
    "dp4a.s32.s32 %r10, %r11, %r12, 3;": lambda a, b: (
        sum(signed(a >> 8 * i, 8) * signed(b >> 8 * i, 8) for i in range(4)) + 3
    ),
}


@pytest.mark.parametrize("instruction", BINARY)
def test_integers(instruction: str) -> None:
    first, second = pairs()
    expected = [BINARY[instruction](a, b) & MASK for a, b in zip(first, second, strict=True)]
    got = evaluate(instruction, first, second)
    if instruction.startswith(("div", "rem")):  # undefined for zero, and for the one quotient that does not fit
        usable = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if b and (a, b) != (1 << 31, MASK)]
        got, expected = [got[i] for i in usable], [expected[i] for i in usable]
    assert got == expected


def f32(value: float) -> int:
    try:
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


def number(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


FLOATS = [0.0, -0.0, 1.0, -1.5, 3.1415927, 1e-38, 1e-45, 6.5e4, 3.4e38, -(2.0**-24), 1 / 3]
FLOAT_BINARY: dict[str, Callable[[float, float], float]] = {
    "add.f32": lambda a, b: a + b,
    "sub.f32": lambda a, b: a - b,
    "mul.rn.f32": lambda a, b: a * b,
    "div.rn.f32": lambda a, b: a / b,
    "max.f32": max,
}


@pytest.mark.parametrize("name", FLOAT_BINARY)
def test_single_precision(name: str) -> None:
    first, second = [f32(a) for a in FLOATS for _ in FLOATS], [f32(b) for _ in FLOATS for b in FLOATS]
    instruction = f"mov.b32 %f1, %r11; mov.b32 %f2, %r12; {name} %f3, %f1, %f2; mov.b32 %r10, %f3;"
    got = evaluate(instruction, first, second)
    for a, b, result in zip(first, second, got, strict=True):
        if (name.startswith("div") and number(b) == 0) or (name == "max.f32" and number(a) == number(b) == 0):
            continue
        # Python's double of two singles, rounded to single: exact for these operations (double has 2 p + 2 digits).
        assert result == f32(FLOAT_BINARY[name](number(a), number(b))), (number(a), number(b))


def half(value: float) -> int:
    return int(struct.unpack("<H", struct.pack("<e", value))[0])


def test_halves_round_once_to_nearest_even() -> None:
    one = half(1.0)
    cases = [
        (half(1.0), half(2.0**-11), half(0.0), one),  # a tie: the even neighbour
        (half(1.0), half(3 * 2.0**-11), half(0.0), half(1 + 2.0**-9)),  # a tie between odd and even
        (half(1 + 2.0**-10), half(1 - 2.0**-10), half(-1.0), half(-(2.0**-20))),  # only a fused product keeps this
    ]
    words = [
        [a | a << 16 for a, _, _, _ in cases],
        [b | b << 16 for _, b, _, _ in cases],
        [c | c << 16 for *_, c, _ in cases],
    ]
    sums = evaluate("add.rn.f16x2 %r10, %r11, %r12;", *words)
    assert sums[:2] == [one | one << 16, cases[1][3] | cases[1][3] << 16]
    fused = evaluate("fma.rn.f16x2 %r10, %r11, %r12, %r13;", *words)
    assert fused[2] == cases[2][3] | cases[2][3] << 16


def test_two_floats_in_one_instruction() -> None:
    words = [[f32(3.0), f32(1 + 2.0**-23)], [f32(-0.5), f32(1 - 2.0**-23)], [f32(2.0**-149), f32(-1.0)]]
    body = """mov.b64 %rd5, {%r11, %r12}; mov.b64 %rd6, {%r12, %r11}; mov.b64 %rd7, {%r13, %r12};
              fma.rn.f32x2 %rd8, %rd5, %rd6, %rd7; mov.b64 {%r5, %r6}, %rd8;"""
    low, high = (evaluate(f"{body} mov.b32 %r10, {half};", *words) for half in ("%r5", "%r6"))
    assert low == [f32(-1.5), f32(-(2.0**-46))]  # only a fused product keeps the second
    assert high == [f32(-2.0), f32((1 + 2.0**-23) * (1 - 2.0**-23) + (1 - 2.0**-23))]


def test_the_lower_half_of_a_pack_is_the_second_source() -> None:
    words = [[f32(1.5)], [f32(-2.0)]]
    floats = "mov.b32 %f1, %r11; mov.b32 %f2, %r12;"
    assert evaluate(f"{floats} cvt.rn.f16x2.f32 %r10, %f1, %f2;", *words) == [half(1.5) << 16 | half(-2.0)]
    assert evaluate(f"{floats} cvt.rn.bf16x2.f32 %r10, %f1, %f2;", *words) == [0x3FC0C000]


def test_bf16_rounds_to_nearest_even_and_once() -> None:
    numbers = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1.0, 0.0, math.inf], np.float32)
    assert bf16_bits(numbers).tolist() == [0x3F80, 0x3F82, 0xBF80, 0, 0x7F80]
    # Just above a tie by less than a float32 can show: rounding to float32 first would fall to even.
    assert int(bf16_bits(np.array([1 + 2.0**-8 + 2.0**-40]))[0]) == 0x3F81
    assert int(bf16_bits(np.array([1 + 2.0**-8 - 2.0**-40]))[0]) == 0x3F80


def test_e4m3_pairs() -> None:
    # OCP 8-bit floating point: 0x38 is 1, 0x7E is 448, 0x01 is 2^-9, the sign is bit 7.
    got = evaluate("cvt.u16.u32 %rs1, %r11; cvt.rn.f16x2.e4m3x2 %r10, %rs1;", [0x38 << 8 | 0x7E, 0x81 << 8 | 0x01])
    assert got == [half(1.0) << 16 | half(448.0), half(-(2.0**-9)) << 16 | half(2.0**-9)]


def test_single_numbers_become_integers() -> None:
    words = [f32(value) for value in (2.5, -2.5, 3.99, -0.5, 1e20)]
    assert evaluate("mov.b32 %f1, %r11; cvt.rzi.s32.f32 %r10, %f1;", words) == [2, -2 & MASK, 3, 0, 0x7FFFFFFF]
    assert evaluate("mov.b32 %f1, %r11; cvt.rni.s32.f32 %r10, %f1;", words) == [2, -2 & MASK, 4, 0, 0x7FFFFFFF]


def test_flushing_of_subnormals_is_done_where_it_is_asked_for() -> None:
    tiny = [[f32(1e-40)], [f32(1.0)]]
    floats = "mov.b32 %f1, %r11; mov.b32 %f2, %r12;"
    assert evaluate(f"{floats} mul.f32 %f3, %f1, %f2; mov.b32 %r10, %f3;", *tiny) == [f32(1e-40)]
    assert evaluate(f"{floats} mul.ftz.f32 %f3, %f1, %f2; mov.b32 %r10, %f3;", *tiny) == [0]


@pytest.mark.parametrize(
    ("mode", "source"),
    [
        ("bfly.b32 %r10, %r11, 5, 31", lambda lane: lane ^ 5),
        ("down.b32 %r10, %r11, 3, 31", lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("up.b32 %r10, %r11, 3, 0", lambda lane: lane - 3 if lane >= 3 else lane),
        ("idx.b32 %r10, %r11, 9, 31", lambda lane: 9),
        ("bfly.b32 %r10, %r11, 1, 0x1c1f", lambda lane: lane ^ 1),
        ("down.b32 %r10, %r11, 1, 0x181f", lambda lane: lane + 1 if lane % 8 != 7 else lane),
    ],
)
def test_shuffles(mode: str, source: Callable[[int], int]) -> None:
    values = [1000 + lane for lane in range(32)]
    assert evaluate(f"shfl.sync.{mode}, 0xffffffff;", values) == [values[source(lane)] for lane in range(32)]


# ---- matrices

PRODUCT = """
    // A is [16][16] at 0, B is [8 columns][16] at 512, both halves; C is [16][8] floats at %rd2.
    mov.b32 %r2, pool;
    mul.lo.s32 %r3, %r1, 24; cvt.u64.u32 %rd3, %r3; add.s64 %rd3, %rd1, %rd3; add.s32 %r4, %r2, %r3;
    ld.global.v2.b32 {%r5, %r6}, [%rd3]; st.shared.v2.b32 [%r4], {%r5, %r6};
    ld.global.v2.b32 {%r5, %r6}, [%rd3+8]; st.shared.v2.b32 [%r4+8], {%r5, %r6};
    ld.global.v2.b32 {%r5, %r6}, [%rd3+16]; st.shared.v2.b32 [%r4+16], {%r5, %r6};
    bar.sync 0;
    and.b32 %r7, %r1, 15; shl.b32 %r7, %r7, 5; shr.u32 %r8, %r1, 4; shl.b32 %r8, %r8, 4;
    add.s32 %r7, %r7, %r8; add.s32 %r7, %r7, %r2;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r7];
    and.b32 %r7, %r1, 7; shl.b32 %r7, %r7, 5; shr.u32 %r8, %r1, 3; and.b32 %r8, %r8, 1; shl.b32 %r8, %r8, 4;
    add.s32 %r7, %r7, %r8; add.s32 %r7, %r7, %r2;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r24, %r25}, [%r7+512];
    mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f3F800000; mov.f32 %f3, 0f3F800000; mov.f32 %f4, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32
        {%f1, %f2, %f3, %f4}, {%r20, %r21, %r22, %r23}, {%r24, %r25}, {%f1, %f2, %f3, %f4};
    shl.b32 %r9, %r1, 3; cvt.u64.u32 %rd4, %r9; add.s64 %rd4, %rd2, %rd4;
    st.global.v2.f32 [%rd4], {%f1, %f2}; st.global.v2.f32 [%rd4+256], {%f3, %f4};
"""


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_ldmatrix_and_mma_multiply(kind: str) -> None:
    generator = np.random.default_rng(0)
    matrices = generator.integers(-8, 8, (24, 16)).astype(np.float32)  # exact in both types, and so are the sums
    stored = matrices.astype(np.float16).view(np.uint16) if kind == "f16" else bf16_bits(matrices)
    outputs = np.zeros((16, 8), np.float32)
    launch(module(PRODUCT.replace("TYPE", kind)), stored, outputs, shared=768)
    assert np.array_equal(outputs, matrices[:16] @ matrices[16:].T + 1)


def test_fragments_are_where_the_isa_says() -> None:
    # "Matrix Fragments for mma.m16n8k16": a2 and a3 of lane 0 are row 8, columns 0 and 1 (register 1); a4 is row 0,
    # column 8 (register 2). b2 of lane 5 is row 8 + 2, column 1 (register 1). c2 of lane 0 is row 8, column 0.
    from kernels.proof.warp import multiply_accumulate

    a, b, c = np.zeros((4, 1, 32), np.uint32), np.zeros((2, 1, 32), np.uint32), np.zeros((4, 1, 32), np.uint32)
    opcode = ("mma", "sync", "aligned", "m16n8k16", "row", "col", "f32", "f16", "f16", "f32")
    a[3, 0, 0 + 1] = half(3.0)  # row 8, column 8 + 2
    b[1, 0, 4 * 1 + 1] = half(5.0)  # row 8 + 2, column 1
    result = multiply_accumulate(opcode, a, b, c).view(np.float32)
    expected = np.zeros((4, 1, 32), np.float32)
    expected[3, 0, 0] = 15.0  # row 8, column 1
    assert np.array_equal(result, expected)


# ---- control flow, memory and what must be refused


def test_a_loop_that_each_thread_leaves_at_its_own_time() -> None:
    body = """
        mov.u32 %r10, 0; mov.u32 %r2, 0;
        again: setp.ge.u32 %p1, %r2, %r1; @%p1 bra done;
        add.s32 %r10, %r10, %r2; add.s32 %r2, %r2, 1; bra.uni again;
        done: mad.wide.u32 %rd4, %r1, 4, %rd2; st.global.u32 [%rd4], %r10;
    """
    outputs = np.zeros(64, np.uint32)
    launch(module(body), np.zeros(4, np.uint8), outputs, threads=64)
    assert outputs.tolist() == [n * (n - 1) // 2 for n in range(64)]


def test_a_barrier_waits_for_warps_that_come_late() -> None:
    # Warp 1 jumps ahead to the barrier's other side of the code; what it reads, warp 0 writes before the barrier.
    body = """
        mov.b32 %r2, pool; shl.b32 %r3, %r1, 2; add.s32 %r4, %r2, %r3;
        setp.ge.u32 %p1, %r1, 32; @%p1 bra meet;
        st.shared.u32 [%r4], %r1;
        meet: bar.sync 0;
        @!%p1 bra end;
        ld.shared.u32 %r10, [%r4+-128]; mad.wide.u32 %rd4, %r1, 4, %rd2; st.global.u32 [%rd4], %r10;
        end:
    """
    outputs = np.zeros(64, np.uint32)
    launch(module(body), np.zeros(4, np.uint8), outputs, threads=64, shared=128)
    assert outputs[32:].tolist() == list(range(32))


def test_atomic_sums_of_all_blocks() -> None:
    outputs = np.zeros(1, np.float32)
    body = "cvt.rn.f32.u32 %f1, %r1; red.global.add.f32 [%rd2], %f1;"
    launch(module(body), np.zeros(4, np.uint8), outputs, blocks=3, threads=64)
    assert outputs[0] == 3 * 64 * 63 / 2


COPY = """
    mov.b32 %r2, pool; shl.b32 %r3, %r1, 4; add.s32 %r4, %r2, %r3; cvt.u64.u32 %rd3, %r3; add.s64 %rd3, %rd1, %rd3;
    cp.async.cg.shared.global.L2::128B [%r4], [%rd3], 16, {count}; cp.async.commit_group;
    cp.async.cg.shared.global.L2::128B [%r4+512], [%rd3], 16, 16; cp.async.commit_group;
    cp.async.wait_group {pending};
    ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r4+{offset}];
    add.s64 %rd4, %rd2, %rd3; sub.s64 %rd4, %rd4, %rd1; st.global.v4.b32 [%rd4], {{%r10, %r11, %r12, %r13}};
"""


def test_asynchronous_copies_land_in_order_and_skipped_ones_are_zero() -> None:
    inputs, outputs = np.arange(128, dtype=np.uint32), np.ones(128, np.uint32)
    launch(module(COPY.format(count=16, pending=1, offset=0)), inputs, outputs, shared=1024)
    assert np.array_equal(outputs, inputs)
    launch(module(COPY.format(count=0, pending=1, offset=0)), inputs, outputs, shared=1024)
    assert not outputs.any()
    with pytest.raises(PtxError, match="still being copied"):
        launch(module(COPY.format(count=16, pending=1, offset=512)), inputs, outputs, shared=1024)


REFUSED = {
    "out of bounds": "ld.global.u32 %r2, [%rd1+4096];",
    "misaligned": "ld.global.u32 %r2, [%rd1+2];",
    "not written yet": "mov.b32 %r3, pool; ld.shared.u32 %r2, [%r3];",
    "shared memory out of bounds": "mov.b32 %r3, pool; st.shared.u32 [%r3+64], %r1;",
    "a part of a warp": "setp.eq.u32 %p1, %r1, 3; @%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xffffffff;",
    "different barriers": "setp.lt.u32 %p1, %r1, 32; @%p1 bra a; bar.sync 0; bra b; a: bar.sync 0; b:",
    "read before it is written": "add.s32 %r2, %r3, 1;",
    "not interpreted": "tanh.approx.f32 %f1, %f1;",
    r"modifier \.sat is not interpreted": "mov.u32 %r2, 0; add.sat.s32 %r2, %r2, 1;",
    "the fragments do not fit": (
        "mov.f32 %f1, 0f00000000; mov.u32 %r2, 0;"
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1,%f1,%f1,%f1}, {%r2,%r2}, {%r2,%r2}, {%f1,%f1,%f1,%f1};"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message: str) -> None:
    with pytest.raises(PtxError, match=message):
        launch(module(REFUSED[message]), np.zeros(64, np.uint8), np.zeros(4, np.uint8), threads=64, shared=64)


def test_refuses_a_write_to_a_read_only_buffer() -> None:
    outputs = np.zeros(4, np.uint32)
    outputs.flags.writeable = False
    with pytest.raises(PtxError, match="read-only"):
        launch(module("st.global.u32 [%rd2], %r1;"), np.zeros(4, np.uint8), outputs)


def test_refuses_arguments_that_the_kernel_does_not_take() -> None:
    function = parse(module(""))["kernel"]
    with pytest.raises(PtxError, match="16 bytes of arguments"):
        run(function, (1, 1, 1), 32, 0, bytes(32), [])
