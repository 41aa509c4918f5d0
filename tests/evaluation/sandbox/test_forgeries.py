"""Each forgery and each escape is a test of its own."""

from __future__ import annotations

import pytest

from qconv.evaluation.sandbox.candidate import Backend
from qconv.evaluation.sandbox.forgeries import FORGERIES, HONEST
from qconv.evaluation.sandbox.forgery import CHECK, Forgery
from qconv.evaluation.sandbox.judge import judge
from qconv.evaluation.sandbox.verdict import Status


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.name.replace(" ", "-"))
def test_fails_in_the_expected_way(backend: Backend, forgery: Forgery) -> None:
    verdict = judge(backend, CHECK, forgery.program, forgery.limits)
    assert verdict.status in forgery.expected, verdict
    assert verdict.reason


@pytest.mark.parametrize("honest", HONEST, ids=lambda honest: honest.name.replace(" ", "-"))
def test_an_honest_program_passes(backend: Backend, honest: Forgery) -> None:
    assert judge(backend, CHECK, honest.program, honest.limits).status is Status.PASS


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(FORGERIES) >= 25
    assert len({forgery.name for forgery in FORGERIES}) == len(FORGERIES)
    assert all(Status.PASS not in forgery.expected for forgery in FORGERIES)
