"""Seeded damage: bytes flipped and cut, values of JSON and YAML exchanged for others, sizes that cannot be."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**9,
    10**30,
    0.5,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "../../x",
    "/dev/zero",
    "a\nb",
    "a\x1b[2J",
    "a\x00b",
    "\u202ea",
    "%s{0}",
    "9" * 400,
    [],
    {},
    [[[[]]]],
    ["x", 1, None],
    {"x": 1},
    {"type": "x"},
)
"""Of every type of JSON, and of the sizes and characters that upset programs."""


def flip(random: random.Random, data: bytes) -> bytes:
    """One to eight bits."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 8)):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def flip_head(random: random.Random, data: bytes) -> bytes:
    """The same, where most formats have their sizes and types."""
    head = min(len(data), 256)
    return flip(random, data[:head]) + data[head:]


def truncate(random: random.Random, data: bytes) -> bytes:
    """Cut the end off, sometimes all."""
    return data[: random.choice((0, 1, 7, 8, 9, random.randrange(len(data) + 1)))]


def cut(random: random.Random, data: bytes) -> bytes:
    """Take a piece out of the middle."""
    start = random.randrange(len(data) + 1)
    return data[:start] + data[start + random.randint(1, 64) :]


def repeat(random: random.Random, data: bytes) -> bytes:
    """Put a piece in twice."""
    start = random.randrange(len(data) + 1)
    end = start + random.randint(1, 64)
    return data[:end] + data[start:end] + data[end:]


def overwrite(random: random.Random, data: bytes) -> bytes:
    """Put a number of four or eight bytes somewhere, as sizes and counts are written."""
    value = random.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
    number = struct.pack("<Q", value)[: random.choice((4, 8))]
    start = random.randrange(max(1, min(len(data), 4096)))
    return data[:start] + number + data[start + len(number) :]


def foreign(random: random.Random, data: bytes) -> bytes:
    """Something else altogether."""
    return random.choice(
        (
            b"\xff\xfe\x00\x00",
            b"null",
            b"[]",
            b"{}",
            b"[" * 50_000,
            b"0" * 100_000,
            b"\x00" * 4096,
            b"<!doctype html><html>",
        )
    )


BYTES: tuple[Mutation, ...] = (flip, flip_head, truncate, cut, repeat, overwrite, foreign)


def json_value(random: random.Random, data: bytes) -> bytes:
    """Exchange, remove or add one value anywhere in a JSON text."""
    return dumped(mutated(random, json.loads(data)))


def json_line(random: random.Random, data: bytes) -> bytes:
    """The same for one line of JSON lines, or the line twice, or gone."""
    lines = data.split(b"\n")
    place = random.randrange(max(1, len(lines) - 1))
    if random.random() < 0.2:
        return b"\n".join([*lines[:place], *lines[place + random.randint(0, 1) * 2 - 1 :]])
    try:
        lines[place] = json_value(random, lines[place])
    except ValueError:
        lines[place] = flip(random, lines[place])
    return b"\n".join(lines)


def safetensors_header(random: random.Random, data: bytes) -> bytes:
    """The same in a safetensors header, whose length stays right."""
    (size,) = struct.unpack("<Q", data[:8])
    header = dumped(mutated(random, json.loads(data[8 : 8 + size])))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def text_line(random: random.Random, data: bytes) -> bytes:
    """Of a text by lines, such as YAML or checksums: one gone, doubled, indented, or with another value."""
    lines = data.decode(errors="replace").split("\n")
    place = random.randrange(len(lines))
    line = lines[place]
    name, colon, _ = line.partition(":")
    odd = random.choice(ODD)
    values = (str(odd), json.dumps(odd), "!!float x", "2001-13-45", "*missing", "&a [*a]", "'", "? [a]", "!!python/x y")
    lines[place : place + 1] = random.choice(
        ([], [line, line], [f"  {line}"], [f"{name}{colon} {random.choice(values)}"], [f"{name}x{colon} 1"])
    )
    return "\n".join(lines).encode(errors="replace")


JSON: tuple[Mutation, ...] = (json_value, json_value, json_value, *BYTES)
JSON_LINES: tuple[Mutation, ...] = (json_line, json_line, json_line, *BYTES)
SAFETENSORS: tuple[Mutation, ...] = (safetensors_header, safetensors_header, safetensors_header, *BYTES)
TEXT: tuple[Mutation, ...] = (text_line, text_line, text_line, *BYTES)


def mutated(random: random.Random, value: Any) -> Any:
    """A JSON value with one value in it exchanged, removed, renamed or doubled."""
    places = list(_places(value))
    if not places or random.random() < 0.02:
        return random.choice(ODD)
    holder, key = random.choice(places)
    action = random.random()
    if action < 0.7:
        holder[key] = _other(random, holder[key])
    elif action < 0.85:
        del holder[key]
    elif isinstance(holder, dict):
        holder[random.choice(("", "x", "../x", "a\nb", f"{key}x"))] = holder.pop(key)
    else:
        holder.insert(key, holder[key])
    return value


def dumped(value: Any) -> bytes:
    """As JSON, with whatever Python lets into it."""
    return json.dumps(value).encode(errors="surrogatepass")


def _other(random: random.Random, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.4:
        return random.choice((value + 1, value - 1, -value, value * 2, value * 2**40, float(value), str(value)))
    if isinstance(value, str) and random.random() < 0.3:
        return random.choice((value + "x", value[:-1], value.upper(), [value]))
    return random.choice(ODD)


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)
