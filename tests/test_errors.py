from __future__ import annotations

import pytest

from pecobook.errors import ConfigError, DataError, PecobookError, Preflight, PreflightError


def fails(*problems: PecobookError) -> None:
    raise problems[0] if len(problems) == 1 else PreflightError(problems)


def test_preflight__makes_every_check_and_gives_what_they_return() -> None:
    found = Preflight()
    assert found.check(lambda: 3) == 3
    assert found.problems == []
    found.finish()


def test_preflight__tells_every_problem_once_and_in_order() -> None:
    found = Preflight()
    found.check(lambda: fails(DataError("no images")))
    assert found.check(lambda: "made all the same") == "made all the same"
    found.check(lambda: fails(ConfigError("a"), ConfigError("b")))  # a preflight of its own
    found.check(lambda: fails(DataError("no images")))
    with pytest.raises(PreflightError) as caught:
        found.finish()
    assert str(caught.value) == "no images\na\nb"
    assert [type(problem) for problem in caught.value.problems] == [DataError, ConfigError, ConfigError]


def test_preflight__a_bug_is_no_problem_of_the_users() -> None:
    with pytest.raises(ZeroDivisionError):
        Preflight().check(lambda: 1 // 0)
