from __future__ import annotations

import pytest

from pecobook.errors import ConfigError, DataError, PecobookError, Preflight, PreflightError


def fails(*problems: PecobookError) -> None:
    raise problems[0] if len(problems) == 1 else PreflightError(problems)


def test_preflight__returns_the_value_of_a_check() -> None:
    preflight = Preflight()
    assert preflight.check(lambda: 3) == 3
    assert preflight.problems == []
    preflight.finish()


def test_preflight__reports_every_problem_once_and_in_order() -> None:
    preflight = Preflight()
    preflight.check(lambda: fails(DataError("no images")))
    assert preflight.check(lambda: "still checked") == "still checked"
    preflight.check(lambda: fails(ConfigError("a"), ConfigError("b")))  # as of a nested preflight
    preflight.check(lambda: fails(DataError("no images")))
    with pytest.raises(PreflightError) as caught:
        preflight.finish()
    assert str(caught.value) == "no images\na\nb"
    assert [type(problem) for problem in caught.value.problems] == [DataError, ConfigError, ConfigError]


def test_preflight__raises_other_errors_at_once() -> None:
    with pytest.raises(ZeroDivisionError):
        Preflight().check(lambda: 1 // 0)
