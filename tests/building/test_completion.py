"""A finished build that is asked for again: what is missing or damaged is named, what the source has anew is copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.imatrix_pipeline import write_model_imatrix
from qconv.building.output import Outcome
from qconv.core.settings import TextSettings
from qconv.errors import OutputError, StaleJournalError, VerificationError
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.verification.build import verify
from tests.conftest import build, folder_bytes, random_model, save_model, small_recipe

RTN = small_recipe()
TEMPLATE = "chat_template.jinja"


@pytest.fixture
def made(moe_copy: Path, tmp_path: Path) -> Path:
    """A build of ``moe_copy``."""
    return build(moe_copy, tmp_path / "out", RTN).out


def gguf(model: Path, out: Path) -> Outcome:
    recipe = parse_gguf_recipe({"type": "Q4_0"})
    return quantize_gguf(model, out, recipe, threads=2, progress=lambda *_: None, log=lambda _: None)


def imatrix(model: Path, out: Path) -> Outcome:
    text = TextSettings(tokens=128, sequence_length=32)
    return write_model_imatrix(model, out, text, threads=2, progress=lambda *_: None, log=lambda _: None)


def quantized(model: Path, out: Path) -> Outcome:
    return build(model, out, RTN)


@pytest.mark.parametrize("run", [quantized, gguf, imatrix])
def test_every_damaged_or_missing_file_is_named(run: Callable[[Path, Path], Outcome], tmp_path: Path) -> None:
    model = save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path / "model")
    out = run(model, tmp_path / "out").out
    whole = folder_bytes(out)
    again = run(model, out)
    assert again.already_complete
    assert not again.renewed
    assert folder_bytes(out) == whole
    for name in whole:
        path = out / name
        damaged = bytearray(whole[name])
        damaged[len(damaged) // 2] ^= 1  # one bit: size and time could be as they were
        path.write_bytes(damaged)
        with pytest.raises(VerificationError) as caught:
            run(model, out)
        assert name in caught.value.message
        assert caught.value.exit_code == 5
        assert caught.value.hint
        path.write_bytes(whole[name])
    weights = [name for name in whole if name.endswith((".safetensors", ".gguf"))]
    assert weights
    for name in weights:
        (out / name).unlink()
        with pytest.raises(VerificationError, match=name):
            run(model, out)
        assert not (out / name).exists()
        (out / name).write_bytes(whole[name])
    assert run(model, out).already_complete


def test_checksums_that_list_nothing_or_lead_elsewhere_are_no_proof(moe_copy: Path, made: Path) -> None:
    sums = made / "SHA256SUMS"
    text = sums.read_text()
    shard = "model-00002-of-00004.safetensors"
    sums.write_text("".join(line for line in text.splitlines(keepends=True) if shard not in line))
    with pytest.raises(VerificationError, match=f"{shard} is not listed"):
        build(moe_copy, made, RTN)
    lines = [f"{'0' * 64}  /dev/zero", f"{'0' * 64}  ../elsewhere", *text.splitlines()]
    sums.write_text("".join(f"{line}\n" for line in sorted(lines, key=lambda line: line[66:])))
    with pytest.raises(VerificationError, match=r"\.\./elsewhere, which lies outside"):
        build(moe_copy, made, RTN)


def changed_source(model: Path) -> None:
    """One companion anew, one more, one less."""
    (model / TEMPLATE).write_text("{% for m in messages %}new{% endfor %}")
    (model / "added_tokens.json").write_text("{}")
    (model / "generation_config.json").unlink()


def test_what_only_travels_with_a_build_is_copied_again(moe_copy: Path, made: Path, tmp_path: Path) -> None:
    shards = {name: (made / name).stat().st_mtime_ns for name in folder_bytes(made) if name.endswith(".safetensors")}
    changed_source(moe_copy)
    told: list[str] = []
    outcome = build(moe_copy, made, RTN, log=told.append)
    assert outcome.already_complete
    assert {TEMPLATE, "added_tokens.json", "generation_config.json"} <= {*outcome.renewed}
    assert any(TEMPLATE in sentence for sentence in told)
    assert folder_bytes(made) == folder_bytes(build(moe_copy, tmp_path / "fresh", RTN).out)
    assert {name: (made / name).stat().st_mtime_ns for name in shards} == shards
    assert verify(made).problems == []
    assert build(moe_copy, made, RTN).renewed == ()


def test_killed_at_any_change_a_renewal_goes_on(
    moe_copy: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_bytes(made)
    changed_source(moe_copy)
    expected = folder_bytes(build(moe_copy, tmp_path / "fresh", RTN).out)
    renaming: dict[str, Callable[..., Any]] = {"rename": os.rename, "unlink": os.unlink, "replace": os.replace}
    for stop in range(1, 100):
        shutil.rmtree(made)
        for name, data in before.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(data)
        calls = 0

        def called(name: str, *given: Any, stop: int = stop, **more: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            renaming[name](*given, **more)

        with monkeypatch.context() as patch:
            for name in renaming:
                patch.setattr(os, name, lambda *given, name=name, **more: called(name, *given, **more))
            try:
                build(moe_copy, made, RTN)
            except KeyboardInterrupt:
                assert calls == stop
            else:
                break
        build(moe_copy, made, RTN)
        assert folder_bytes(made) == expected, f"stopped before change {stop}"
    assert stop > 5  # three companions, report and checksums at the least


def test_a_companion_that_is_gone_from_the_build_comes_back(moe_copy: Path, made: Path) -> None:
    whole = folder_bytes(made)
    for name in (TEMPLATE, "README.md", "config.json"):
        (made / name).unlink()
        assert name in build(moe_copy, made, RTN).renewed
        assert folder_bytes(made) == whole


def test_a_file_of_somebody_else_is_not_replaced_by_a_companion(moe_copy: Path, made: Path) -> None:
    (made / "added_tokens.json").write_text("mine")
    changed_source(moe_copy)
    with pytest.raises(OutputError, match=r"added_tokens\.json"):
        build(moe_copy, made, RTN)
    assert (made / "added_tokens.json").read_text() == "mine"


def test_what_a_gguf_embeds_makes_it_stale(tmp_path: Path) -> None:
    model = save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path / "model")
    out = gguf(model, tmp_path / "out").out
    (model / "LICENSE").write_text("another")  # which it does not embed
    assert gguf(model, out).already_complete
    whole = folder_bytes(out)
    (model / TEMPLATE).write_text("{% for m in messages %}new{% endfor %}")
    with pytest.raises(StaleJournalError, match=rf"embedded files: {TEMPLATE}=\w+ there, {TEMPLATE}=\w+ now") as caught:
        gguf(model, out)
    assert caught.value.exit_code == 5
    assert folder_bytes(out) == whole


def test_chats_of_another_template_make_a_calibrated_build_stale(moe_copy: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Count to {number}: " + "one two three " * 40}]}
        for number in range(9)
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = small_recipe("awq", "awq", calibration={"corpus": f"jsonl:{chats}:messages"})
    out = build(moe_copy, tmp_path / "out", recipe).out
    (moe_copy / TEMPLATE).write_text("{% for m in messages %}{{ m['content'] }} again {% endfor %}")
    with pytest.raises(StaleJournalError, match="calibration data changed"):
        build(moe_copy, out, recipe)


def test_another_arithmetic_makes_no_finished_build_stale(
    moe_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe("awq", "awq")
    out = build(moe_copy, tmp_path / "out", recipe).out
    monkeypatch.setattr("qconv.building.arithmetic.digest", lambda: "another")
    assert build(moe_copy, out, recipe).already_complete


def test_an_unfinished_build_takes_the_companions_of_the_day(moe_copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Stop(Exception):
        pass

    def progress(what: str, done: int, total: int) -> None:
        if what == "finishing":
            raise Stop

    with pytest.raises(Stop):
        build(moe_copy, out, RTN, progress=progress)
    changed_source(moe_copy)
    build(moe_copy, out, RTN)
    assert folder_bytes(out) == folder_bytes(build(moe_copy, tmp_path / "fresh", RTN).out)
