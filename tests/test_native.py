"""Compiling at first use: once, safely with others, again when anything changes, and never a reason to fail."""

from __future__ import annotations

import logging
import multiprocessing
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from qconv import native
from qconv.native import NativeError, build

PROGRAM = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return kAnswer; }\n'


def compiler_or_skip() -> list[str]:
    try:
        return native.compiler()
    except NativeError:
        pytest.skip("needs a C++ compiler")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "program.cpp").write_text(PROGRAM)
    (folder / "answer.h").write_text("constexpr int kAnswer = 41;\n")
    return folder


@pytest.fixture
def counted(tmp_path: Path) -> tuple[list[str], Path]:
    """A compiler that keeps a list of what it compiled."""
    real, log, script = compiler_or_skip(), tmp_path / "compiled", tmp_path / "compiler"
    log.touch()
    script.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) ;; *) echo "$*" >> {log} ;; esac\nexec {" ".join(real)} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return [str(script)], log


@pytest.fixture
def forgotten() -> Iterator[None]:
    """As if nothing had been loaded."""
    native._loaded.cache_clear()
    yield
    native._loaded.cache_clear()


def test_a_library_is_compiled_once_and_again_when_a_header_changes(
    sources: Path, tmp_path: Path, counted: tuple[list[str], Path]
) -> None:
    compiler, log = counted
    for expected in (1, 1):
        assert build(sources, "program", tmp_path / "cache", compiler).answer() == 41
        assert len(log.read_text().splitlines()) == expected
    (sources / "answer.h").write_text("constexpr int kAnswer = 42;\n")
    assert build(sources, "program", tmp_path / "cache", compiler).answer() == 42
    assert len(log.read_text().splitlines()) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2  # nothing temporary stays


def test_other_flags_make_another_library(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = compiler_or_skip()
    build(sources, "program", tmp_path, compiler)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DNDEBUG"))
    build(sources, "program", tmp_path, compiler)
    # As another processor or compiler would: their macros differ.
    build(sources, "program", tmp_path, [*compiler, "-D__SOMETHING__"])
    assert len(list(tmp_path.glob("program-*.so"))) == 3


def test_a_damaged_file_in_the_cache_is_replaced(sources: Path, tmp_path: Path) -> None:
    compiler, cache = compiler_or_skip(), tmp_path / "cache"
    cache.mkdir()
    # The name is found with a header that gives another answer, and never loaded: dlopen would remember it.
    damaged = cache / f"program-{native._digest(sources, 'program', compiler)}.so"
    damaged.write_bytes(b"\x7fELF, or what a full disk left of it")
    assert build(sources, "program", cache, compiler).answer() == 41
    assert damaged.stat().st_size > 1000


def _answer(sources: Path, cache: Path, barrier: object) -> int:
    barrier.wait()  # type: ignore[attr-defined]  # a manager's proxy has no type
    return int(build(sources, "program", cache, native.compiler()).answer())


def test_processes_may_build_at_once(sources: Path, tmp_path: Path) -> None:
    compiler_or_skip()
    cache = tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(3) as pool:
        barrier = manager.Barrier(3)
        assert pool.starmap(_answer, [(sources, cache, barrier)] * 3) == [41, 41, 41]
    assert [file.suffix for file in cache.iterdir()] == [".so"]


def test_a_compiler_that_fails_is_reported_by_its_first_error(sources: Path, tmp_path: Path) -> None:
    (sources / "program.cpp").write_text("int answer( { }\n")
    cache = tmp_path / "cache"
    with pytest.raises(NativeError, match=r"fails with '.*program\.cpp:1.*error"):
        build(sources, "program", cache, compiler_or_skip())
    assert list(cache.iterdir()) == []
    with pytest.raises(NativeError, match="/nowhere/c\\+\\+ does not run"):
        build(sources, "program", cache, ["/nowhere/c++"])


def test_a_cache_that_cannot_be_written_is_reported(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(NativeError, match="cannot be made"):
        build(sources, "program", tmp_path / "cache", compiler_or_skip())


def test_without_a_compiler_there_is_one_warning_and_no_library(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with caplog.at_level(logging.WARNING, "qconv"):
        assert native.load("ggml") is None
        assert native.load("ggml") is None
    assert [record.getMessage() for record in caplog.records] == [
        "ggml is left to torch, several times slower: no C++ compiler is installed. With a C++ compiler (g++, clang++ "
        "or $CXX) it is fast; QCONV_NATIVE=0 silences this."
    ]


def test_the_switch_leaves_everything_to_torch(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.load("ggml") is None
    assert caplog.records == []


def test_compiler_and_cache_are_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert native.compiler() == ["ccache", "g++", "-m64"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / "qconv/native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / ".cache/qconv/native"


def test_the_sources_are_there() -> None:
    assert (native.kernels_folder() / "cpu" / "ggml.cpp").is_file()
    assert os.access(native.kernels_folder(), os.R_OK)
