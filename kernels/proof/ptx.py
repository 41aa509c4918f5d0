"""Reads PTX, the assembly that nvcc and NVRTC emit, into instructions for :mod:`kernels.proof.machine`.

Only what compilers emit for the kernels is understood; anything else raises :class:`PtxError` and is never skipped.
Reference: NVIDIA, "Parallel Thread Execution ISA", chapters 4 (syntax), 5 (state spaces and types), 11 (directives).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


class PtxError(Exception):
    """The PTX is not understood, or a program does what the hardware does not define."""


TYPE_BYTES = {
    **dict.fromkeys(("b8", "u8", "s8", "pred"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
}
"""Bytes of a value of each type; a predicate is held as one byte."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: ``@%p1 add.s32 %r1, %r2, 3`` has predicate ``%p1``, opcode ``("add", "s32")``, three operands.

    Attributes:
        opcode: The mnemonic and its modifiers, in order; ``::`` counts as a dot.
        operands: As written; a vector operand keeps its braces, an address its brackets.
        predicate: The guarding register, or None.
        negated: Whether the guard is ``@!``.
    """

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.predicate} " if self.predicate else ""
        return f"{guard}{'.'.join(self.opcode)} {', '.join(self.operands)}"


@dataclass(frozen=True, slots=True)
class Function:
    """One ``.entry``.

    Attributes:
        parameters: Byte offset of each parameter in the parameter block.
        parameter_bytes: Size of that block.
        registers: Declared type of each register; ``%r`` stands for every ``%r<number>``.
        instructions: In order.
        labels: The instruction that each label stands before.
        shared: Byte offset of each variable in shared memory; the dynamic one comes last, at :attr:`static_bytes`.
        static_bytes: Shared memory that the function declares itself.
        constants: Initialised module-scope arrays by name.
        max_threads: From ``.maxntid``, or None.
    """

    name: str
    parameters: dict[str, int]
    parameter_bytes: int
    registers: dict[str, str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: dict[str, int]
    static_bytes: int
    constants: dict[str, bytes]
    max_threads: int | None


_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{]*)\{")
_VARIABLE = re.compile(
    r"\.(?P<space>shared|const|global)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d*)\])?(?:\s*=\s*\{(?P<values>[^}]*)\})?\s*$"
)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[\s.\w]*\s)?([\w$]+)(?:\[(\d+)\])?")
_STATEMENT = re.compile(r"(?:@(?P<negated>!?)(?P<predicate>%\w+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*)", re.S)
_LABEL = re.compile(r"\s*([\w$]+)\s*:(?!:)")


def parse(ptx: str) -> dict[str, Function]:
    """Every entry of a module.

    Raises:
        PtxError: a statement is not understood.
    """
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx.rstrip("\0"), flags=re.S)
    first = _ENTRY.search(text)
    module_scope = text[: first.start()] if first else text
    shared, constants = _variables(module_scope)
    functions = {}
    for entry in _ENTRY.finditer(text):
        function = _function(entry, _body(text, entry.end()), shared, constants)
        functions[function.name] = function
    return functions


def _body(text: str, start: int) -> str:
    """The text from ``start`` to the brace that closes the function."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    raise PtxError("a function has no end")


def _variables(module_scope: str) -> tuple[dict[str, tuple[int, int]], dict[str, bytes]]:
    """Shared variables as (bytes, alignment), zero bytes for the dynamic one; and initialised arrays."""
    shared: dict[str, tuple[int, int]] = {}
    constants: dict[str, bytes] = {}
    for statement in module_scope.split(";"):
        found = _VARIABLE.search(statement)
        if not found:
            continue
        width = TYPE_BYTES[found["type"]]
        count = 1 if found["count"] is None else int(found["count"] or 0)
        if found["space"] == "shared":
            shared[found["name"]] = (width * count, int(found["align"] or width))
        else:
            values = [int(value, 0) for value in (found["values"] or "").split(",") if value.strip()]
            data = b"".join((value % (1 << 8 * width)).to_bytes(width, "little") for value in values)
            constants[found["name"]] = data.ljust(width * count, b"\0")
    return shared, constants


def _function(
    entry: re.Match[str], body: str, module_shared: dict[str, tuple[int, int]], constants: dict[str, bytes]
) -> Function:
    parameters, end = {}, 0
    for align, kind, name, count in _PARAMETER.findall(entry["parameters"]):
        width = TYPE_BYTES[kind]
        end = -(-end // int(align or width)) * int(align or width)
        parameters[name] = end
        end += width * int(count or 1)

    registers: dict[str, str] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    own_shared: dict[str, tuple[int, int]] = {}
    for statement in _statements(body):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif statement.startswith(".reg"):
            _declare(statement, registers)
        elif statement.startswith(".shared"):
            own_shared |= _variables(statement)[0]
        elif not statement.startswith((".loc", ".pragma")):
            instructions.append(_instruction(statement))

    offset, shared, dynamic = 0, {}, []
    for name, (size, align) in (module_shared | own_shared).items():
        if size == 0:
            dynamic.append(name)
            continue
        if name in body:
            offset = -(-offset // align) * align
            shared[name] = offset
            offset += size
    shared |= dict.fromkeys(dynamic, offset)
    threads = re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", entry["directives"])
    return Function(
        name=entry["name"],
        parameters=parameters,
        parameter_bytes=end,
        registers=registers,
        instructions=tuple(instructions),
        labels=labels,
        shared=shared,
        static_bytes=offset,
        constants={name: data for name, data in constants.items() if name in body},
        max_threads=int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1) if threads else None,
    )


def _statements(body: str) -> list[str]:
    """Labels (with their colon) and statements, without the braces that open and close scopes of inline assembly."""
    found, at = [], 0
    while at < len(body):
        if body[at].isspace() or body[at] in "{};":
            at += 1
        elif label := _LABEL.match(body, at):
            found.append(f"{label[1]}:")
            at = label.end()
        else:
            end = body.find("\n" if body.startswith(".loc", at) else ";", at)
            if end < 0:
                raise PtxError(f"a statement has no end: {body[at : at + 80]!r}")
            found.append(body[at:end].strip())
            at = end + 1
    return found


def _declare(statement: str, registers: dict[str, str]) -> None:
    _, kind, names = statement.split(None, 2)
    for name in names.split(","):
        key, declared = name.strip().split("<")[0], kind.removeprefix(".")
        if TYPE_BYTES[registers.setdefault(key, declared)] != TYPE_BYTES[declared]:
            raise PtxError(f"register {key} is declared with two widths")


def _instruction(statement: str) -> Instruction:
    found = _STATEMENT.fullmatch(statement)
    if not found:
        raise PtxError(f"not an instruction: {statement!r}")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found["operands"])
    return Instruction(
        opcode=tuple(found["opcode"].replace("::", ".").split(".")),
        operands=tuple(operand.strip() for operand in operands),
        predicate=found["predicate"],
        negated=found["negated"] == "!",
    )
