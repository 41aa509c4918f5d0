"""The cache of compiled kernels: hits, misses, damage, and folders that cannot be used."""

from dataclasses import replace
from pathlib import Path

import pytest

from qconv.runtime.backends.cuda.cache import cache_folder, cached_cubin, entry_name
from qconv.runtime.backends.cuda.compiler import Source

SOURCE = Source("k.cu", "text", {"h.cuh": "header"}, {"A": "1"})


class Compiler:
    """Counts its calls; what it makes tells for what."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source: Source, architecture: int) -> bytes:
        self.calls += 1
        return f"{source.text} for {architecture}".encode()


def test_compiles_once(tmp_path: Path) -> None:
    compiler = Compiler()
    for _ in range(3):
        assert cached_cubin(SOURCE, 80, folder=tmp_path, compile=compiler) == b"text for 80"
    assert compiler.calls == 1
    assert cached_cubin(SOURCE, 90, folder=tmp_path, compile=compiler) == b"text for 90"
    assert compiler.calls == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".kernel", ".kernel"]  # no temporary file stays


def test_the_name_depends_on_everything_that_the_bytes_do() -> None:
    others = [
        replace(SOURCE, text="Text"),
        replace(SOURCE, headers={"h.cuh": "Header"}),
        replace(SOURCE, headers={"g.cuh": "header"}),
        replace(SOURCE, defines={"A": "2"}),
        replace(SOURCE, name="l.cu"),
    ]
    names = [entry_name(source, 80, "13.5") for source in (SOURCE, *others)]
    names += [entry_name(SOURCE, 90, "13.5"), entry_name(SOURCE, 80, "13.6")]
    assert len(set(names)) == len(names)
    assert names[0] == entry_name(replace(SOURCE), 80, "13.5")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_entry_is_compiled_again_and_replaced(tmp_path: Path, damage: str) -> None:
    compiler = Compiler()
    cached_cubin(SOURCE, 80, folder=tmp_path, compile=compiler)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    entry.write_bytes({"flip": flipped, "cut": whole[:-3], "empty": b"", "foreign": b"x" * 100}[damage])
    assert cached_cubin(SOURCE, 80, folder=tmp_path, compile=compiler) == b"text for 80"
    assert compiler.calls == 2
    assert entry.read_bytes() == whole


def test_a_folder_that_cannot_be_made_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    compiler = Compiler()
    for _ in range(2):
        assert cached_cubin(SOURCE, 80, folder=tmp_path / "file" / "kernels", compile=compiler) == b"text for 80"
    assert compiler.calls == 2


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    assert cached_cubin(SOURCE, 80, folder=tmp_path, compile=Compiler()) == b"text for 80"
    assert not list(tmp_path.iterdir())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("QCONV_CACHE", raising=False)
    assert cache_folder() == Path("/x/qconv/kernels")
    monkeypatch.setenv("QCONV_CACHE", "/own")
    assert cache_folder() == Path("/own/kernels")
