from __future__ import annotations

import pytest

from pecobook.errors import ConfigError, DataError, PecobookError, Preflight, PreflightError, printable


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cats/schön 猫.png", "cats/schön 猫.png"),
        ("a\n2026-01-01 done", "a\\n2026-01-01 done"),
        ("\x1b[2J\x9b31m", "\\x1b[2J\\x9b31m"),
        ("gnp.\u202etac", "gnp.\\u202etac"),
        ("\udcff\u2028", "\\udcff\\u2028"),
    ],
)
def test_printable__escapes_what_changes_a_terminal_or_forges_a_line(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).encode()
    assert printable(f"one\n{text}", keep="\n").splitlines()[0] == "one"
