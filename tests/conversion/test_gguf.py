"""GGUF in files of another size: the same bytes when it is whole again, and every key with its type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qconv.building.gguf_pipeline import quantize_gguf
from qconv.conversion.gguf import split_anew, typed_keys
from qconv.errors import OutputError, StaleJournalError
from qconv.formats.gguf.container import GgufWriter
from qconv.formats.gguf.reader import GgufModel
from qconv.verification.gguf import verify_gguf
from tests.conftest import folder_bytes, random_model, save_model


def again(path: Path, out: Path, size: int, **options: Any) -> Any:
    return split_anew(path, out, size, **{"progress": lambda *_: None, "log": lambda _: None, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qconv.planning.gguf_recipe import parse_gguf_recipe

    folder = tmp_path_factory.mktemp("gguf")
    sizes: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "norm_topk_prob": True}
    model = save_model(random_model("qwen3_moe", **sizes), folder / "model")
    recipe = parse_gguf_recipe({"format": "gguf", "type": "Q8_0"})
    quantize_gguf(model, folder / "whole", recipe, progress=lambda *_: None, log=lambda _: None)
    return folder / "whole"


def test_split_and_merged_again_it_is_the_same_file(whole: Path, tmp_path: Path) -> None:
    (file,) = whole.glob("*.gguf")
    outcome = again(whole, tmp_path / "split", 200_000)
    parts = sorted((tmp_path / "split").glob("*.gguf"))
    assert len(parts) > 3
    assert outcome.report["files"] == [part.name for part in parts]
    assert not verify_gguf(tmp_path / "split", None).problems
    assert typed_keys(parts[0]) == typed_keys(file)
    again(parts[2], tmp_path / "merged", 10**9)  # any file of a set stands for it
    (merged,) = (tmp_path / "merged").glob("*.gguf")
    assert merged.read_bytes() == file.read_bytes()
    assert not verify_gguf(tmp_path / "merged", None).problems


def test_a_second_run_has_nothing_to_do_and_another_size_is_stale(whole: Path, tmp_path: Path) -> None:
    again(whole, tmp_path / "out", 200_000)
    before = folder_bytes(tmp_path / "out")
    assert again(whole, tmp_path / "out", 200_000).already_complete
    with pytest.raises(StaleJournalError):
        again(whole, tmp_path / "out", 300_000)
    assert folder_bytes(tmp_path / "out") == before


def test_interrupted_it_goes_on_and_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again(whole, tmp_path / "undisturbed", 200_000)
    published: list[str] = []
    publish = GgufWriter.publish

    def failing(self: Any) -> None:
        if len(published) == 2:
            raise KeyboardInterrupt
        publish(self)
        published.append(self.path.name)

    monkeypatch.setattr(GgufWriter, "publish", failing)
    with pytest.raises(KeyboardInterrupt):
        again(whole, tmp_path / "out", 200_000)
    monkeypatch.setattr(GgufWriter, "publish", publish)
    written = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in published}
    again(whole, tmp_path / "out", 200_000)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "undisturbed")
    assert written == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in published}


def test_a_file_of_another_program_keeps_every_key_with_its_type(tmp_path: Path) -> None:
    source = tmp_path / "foreign" / "model.gguf"
    source.parent.mkdir()
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_uint8("a.byte", 7)
    writer.add_int64("a.long", -(2**40))
    writer.add_float64("a.double", 0.1)
    writer.add_bool("a.flag", True)
    writer.add_array("a.texts", ["x", "ÿ", ""])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_custom_alignment(64)
    tensors = {
        f"blk.{number}.w": np.random.default_rng(number).normal(size=(4, 64)).astype(np.float32) for number in range(5)
    }
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    outcome = again(source, tmp_path / "out", 2048)
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(files) == 3
    assert outcome.report["format"] == "gguf:F32"
    keys, before = typed_keys(files[0]), typed_keys(source)
    assert keys == before
    assert keys["a.byte"].type is gguf.GGUFValueType.UINT8
    assert keys["a.double"].value == 0.1
    model, original = GgufModel.open(files[0]), GgufModel.open(source)
    for name, values in tensors.items():
        assert b"".join(block.numpy().tobytes() for block in model.blocks(name)) == values.tobytes()
        assert b"".join(block.numpy().tobytes() for block in original.blocks(name)) == values.tobytes()


def test_it_does_not_write_where_others_do(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError):
        again(whole, tmp_path / "out", 200_000)
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["notes.txt"]
