"""Gates: passed, failed, undecided; what the verdict makes of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qconv.errors import UsageError
from qconv.evaluation.gates import BuildClass, GateFile, class_of, load_gates, rerun_merged, verdict
from qconv.evaluation.judging import judge, paired
from qconv.evaluation.record import Artifact, Gate, Item, Metric, Run, Status, Task
from qconv.evaluation.statistics import mcnemar_p
from qconv.evaluation.suites import packaged_names
from tests.evaluation.test_record import SHA, example

GATES = GateFile(
    classes=(
        BuildClass(
            name="4 bits",
            bits=(3.9, 5.0),
            reference={"kld.mean": 0.01, "ppl.ratio": 1.02, "top1.flips": 0.1, "pass@1": 0.03},
            baseline={"kld.mean": 0.1, "ppl.ratio": 0.002, "top1.flips": 0.1, "pass@1": 0.03},
        ),
    )
)


def text_task(kl: float = 0.004, *, units: int = 40, seed: int = 0, noise: float = 0.0, **changes: object) -> Task:
    """Documents whose divergence scatters around a mean; the same seed gives the same documents."""
    generator = np.random.default_rng(seed)
    items = []
    for index in range(units):
        tokens = float(generator.integers(100, 500))
        difficulty = generator.gamma(8.0, 1 / 8.0)
        divergence = kl * tokens * difficulty
        nll = 3.0 * tokens * difficulty
        values = {
            "tokens": tokens,
            "bytes": 2 * tokens,
            "kl": divergence,
            "reference_nll": nll,
            "nll": nll + divergence * generator.normal(1.0, 0.1),
            "flips": round(10 * divergence),
        }
        items.append(Item(name=f"d{index}", values=values))
    metrics = {name: Metric(value=1.0) for name in ("kld.mean", "ppl.ratio", "top1.flips")}
    task: dict[str, object] = {
        "name": "text",
        "kind": "text",
        "inputs_sha256": SHA,
        "source": "",
        "unit": "document",
        "settings": {},
        "metrics": metrics | {"noise.kld.mean": Metric(value=noise)},
        "items": tuple(items),
    }
    return Task.model_validate(task | changes)


def problems(passed: list[int], reference: list[int], samples: int = 1) -> Task:
    def items(counts: list[int]) -> tuple[Item, ...]:
        return tuple(
            Item(name=f"p{index}", values={"samples": samples, "passed": count}) for index, count in enumerate(counts)
        )

    task = text_task(units=1, name="humaneval", kind="humaneval", unit="problem", items=items(passed), metrics={})
    return task.model_copy(update={"reference_items": items(reference)})


def scaled(task: Task, factor: float, *names: str) -> Task:
    """A build that is worse by a factor on every document."""
    items = tuple(
        Item(name=one.name, values={key: value * (factor if key in names else 1) for key, value in one.values.items()})
        for one in task.items
    )
    return task.model_copy(update={"items": items})


def statuses(task: Task, baseline: Run | None = None) -> dict[str, Status]:
    found = judge([task], GATES.classes[0], GATES, baseline)
    return {f"{gate.against} {gate.metric}": gate.status for gate in found}


def test_a_sound_build_passes_every_gate() -> None:
    baseline = example(tasks=(text_task(),))
    assert set(statuses(text_task(), baseline).values()) == {"pass"}
    assert len(statuses(text_task(), baseline)) == 6


def test_far_beyond_the_limit_fails_and_just_beyond_is_inconclusive() -> None:
    assert statuses(text_task(0.02))["reference kld.mean"] == "fail"
    assert statuses(text_task(0.0103))["reference kld.mean"] == "inconclusive"
    assert statuses(text_task(0.0097))["reference kld.mean"] == "pass"


def test_each_metric_has_its_own_gate() -> None:
    sound = text_task()
    worse = scaled(sound, 30.0, "flips")
    assert statuses(worse) == {
        "reference kld.mean": "pass",
        "reference ppl.ratio": "pass",
        "reference top1.flips": "fail",
    }
    assert statuses(scaled(sound, 1.05, "nll"))["reference ppl.ratio"] == "fail"


def test_paired_with_the_baseline_a_small_loss_is_found() -> None:
    sound = text_task()
    baseline = example(tasks=(sound,))
    worse = statuses(scaled(sound, 1.15, "kl"), baseline)
    # Far within the absolute limit, and far less than documents differ from each other.
    assert worse["reference kld.mean"] == "pass"
    assert worse["baseline kld.mean"] == "fail"
    assert statuses(scaled(sound, 1.09, "kl"), baseline)["baseline kld.mean"] == "pass"


def test_a_difference_within_the_noise_floor_is_allowed() -> None:
    baseline = example(tasks=(text_task(1e-6),))
    worse = scaled(text_task(1e-6), 2.0, "kl")
    assert statuses(worse, baseline)["baseline kld.mean"] == "fail"
    noisy = scaled(text_task(1e-6, noise=2e-6), 2.0, "kl")
    assert statuses(noisy, baseline)["baseline kld.mean"] == "pass"


def test_on_other_text_the_baseline_still_counts_unpaired() -> None:
    baseline = example(tasks=(text_task(seed=1, inputs_sha256="1" * 64),))
    assert set(statuses(text_task(seed=2), baseline).values()) == {"pass"}
    assert statuses(text_task(0.008, seed=2), baseline)["baseline kld.mean"] == "fail"


def test_windows_of_other_texts_are_not_paired() -> None:
    one, other = text_task(unit="window"), text_task(unit="window", inputs_sha256="1" * 64)
    assert paired(one, one, 10)[0] == one.items
    assert paired(one, other, 10) == ((), ())
    # Documents are, as far as they are the same documents.
    some = text_task(inputs_sha256="1" * 64, items=text_task().items[5:])
    assert paired(text_task(), some, 10) == (text_task().items[5:], some.items)


def test_few_units_decide_nothing() -> None:
    assert set(statuses(text_task(units=9)).values()) == {"inconclusive"}


def test_infinite_values_fail() -> None:
    task = text_task()
    broken = Item(name="d0", values=task.items[0].values | {"kl": float("inf"), "nll": float("inf")})
    found = statuses(task.model_copy(update={"items": (broken, *task.items[1:])}))
    assert found["reference kld.mean"] == found["reference ppl.ratio"] == "fail"


@pytest.mark.parametrize(
    ("lost", "gained", "status"),
    [(0, 0, "pass"), (4, 0, "pass"), (5, 0, "inconclusive"), (11, 0, "fail"), (30, 26, "pass"), (16, 1, "fail")],
)
def test_pass_at_1_needs_three_points_and_significance(lost: int, gained: int, status: Status) -> None:
    """164 problems: 4 lost are 2.4 points; 5 lost are 3.05 points, p = 0.06; 11 lost p = 0.00098."""
    reference = [1] * lost + [0] * gained + [1, 0] * 82
    passed = [0] * lost + [1] * gained + [1, 0] * 82
    task = problems(passed[:164], reference[:164])
    (gate,) = judge([task], GATES.classes[0], GATES)
    assert gate.status == status
    assert gate.p_value == pytest.approx(mcnemar_p(lost, gained))
    assert gate.detectable is not None


def test_sampled_problems_are_compared_by_rates() -> None:
    generator = np.random.default_rng(0)
    reference = generator.integers(0, 11, 60).tolist()
    worse = [max(0, count - 4) for count in reference]
    (failed,) = judge([problems(worse, reference, samples=10)], GATES.classes[0], GATES)
    (passed,) = judge([problems(reference, reference, samples=10)], GATES.classes[0], GATES)
    assert (failed.status, passed.status) == ("fail", "pass")


def test_holm_spares_a_gate_that_only_many_gates_make_significant() -> None:
    def p_value(gates: tuple[Gate, ...]) -> float:
        gate = next(gate for gate in gates if gate.metric == "kld.mean")
        assert gate.p_value is not None
        assert gate.adjusted_p_value is not None
        return gate.adjusted_p_value / gate.p_value

    alone = GATES.classes[0].model_copy(update={"reference": {"kld.mean": 0.01}})
    assert p_value(judge([text_task(0.012)], alone, GATES)) == 1.0
    assert p_value(judge([text_task(0.012)], GATES.classes[0], GATES)) == pytest.approx(3.0)


def test_false_alarms_are_as_rare_as_alpha_promises() -> None:
    """100 builds exactly at the limit: half exceed it by chance, hardly any fails."""
    counts = {"pass": 0, "fail": 0, "inconclusive": 0}
    only = GATES.classes[0].model_copy(update={"reference": {"kld.mean": 0.01}})
    for seed in range(100):
        (gate,) = judge([text_task(0.01, seed=seed)], only, GATES)
        counts[gate.status] += 1
    assert counts["fail"] <= 1
    assert counts["inconclusive"] > 25


def gate(status: Status, name: str = "g", against: str = "reference") -> Gate:
    return Gate.model_validate(
        {"name": name, "against": against, "task": "t", "metric": "kld.mean", "status": status, "sentence": status}
    )


@pytest.mark.parametrize(
    ("gates", "code"),
    [
        ([gate("pass"), gate("pass")], 0),
        ([gate("pass"), gate("inconclusive")], 4),
        ([gate("inconclusive"), gate("fail")], 3),
        ([gate("fail"), gate("fail", against="integrity")], 5),
        ([], 0),
    ],
)
def test_the_worst_gate_decides(gates: list[Gate], code: int) -> None:
    assert verdict(gates).exit_code == code


def test_what_fails_once_and_passes_once_is_inconclusive() -> None:
    first = [gate("fail", "a"), gate("fail", "b"), gate("pass", "c")]
    second = [gate("fail", "a"), gate("pass", "b"), gate("fail", "c")]
    assert [(one.name, one.status, one.reruns) for one in rerun_merged(first, second)] == [
        ("a", "fail", 1),
        ("b", "inconclusive", 1),
        ("c", "pass", 0),
    ]


@pytest.fixture
def artifact() -> Callable[..., Artifact]:
    def make(**changes: object) -> Artifact:
        return Artifact.model_validate({"name": "b", "path": "b", "kind": "build", "sha256": SHA} | changes)

    return make


@pytest.mark.parametrize(
    ("bits", "name"), [(16.0, "unquantized"), (8.06, "8 bits"), (4.13, "4 bits"), (4.83, "4 bits"), (2.6, "2 bits")]
)
def test_packaged_classes_are_chosen_by_bits(bits: float, name: str, artifact: Callable[..., Artifact]) -> None:
    assert class_of(load_gates("default"), artifact(quantized_bits_per_weight=bits)).name == name


def test_an_unquantized_model_is_a_class_and_an_unknown_build_is_none(artifact: Callable[..., Artifact]) -> None:
    assert class_of(load_gates("default"), artifact(kind="model")).name == "unquantized"
    with pytest.raises(UsageError, match="no class"):
        class_of(load_gates("default"), artifact())


def test_every_packaged_file_of_gates_is_well_formed() -> None:
    for name in packaged_names("gates"):
        assert load_gates(name).classes


def test_a_gate_on_an_unknown_metric_is_named() -> None:
    with pytest.raises(ValueError, match=r"kld\.meen"):
        BuildClass(name="x", bits=(1, 2), reference={"kld.meen": 1.0})
