"""What checks the READMEs, checked: it finds what is wrong in one."""

import pytest

from tests.support.readme import check_commands, check_program, shows

UUID = "3b241101-e2bb-4255-8caf-4136c566a962"
OTHER = "00000000-0000-4000-8000-000000000000"


@pytest.mark.parametrize(
    ("readme", "screen", "shown"),
    [
        ("12:00:00.000  1.00 s\n", "23:59:59.999  12.34 s\n", True),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nd\n", True),
        ("a\n...\nd\n", "a\nb\nc\n", False),
        ("date: …\n", "date: Fri, 20 Nov 2026 10:00:00 GMT\n", True),
        ("date: …\n", "date: Fri\nb\n", False),
        (f"{UUID}\n{UUID}\n", f"{OTHER}\n{OTHER}\n", True),
        (f"{UUID}\n{UUID}\n", f"{OTHER}\n{UUID}\n", False),
        ("a.c\n", "abc\n", False),
        ("a\n", "a\nb\n", False),
        ("", "a\n", False),
    ],
)
def test_a_screen_shows_what_the_readme_does(readme: str, screen: str, shown: bool) -> None:
    assert shows(readme, screen) == shown


def test_a_uuid_that_was_shown_goes_on_in_the_commands_that_follow() -> None:
    new = "cat /proc/sys/kernel/random/uuid | tee /dev/stderr"
    check_commands(f"$ {new}\n{UUID}\n{UUID}\n$ echo {UUID}\n{UUID}\n")
    with pytest.raises(AssertionError):
        check_commands(f"$ {new}\n{UUID}\n{UUID}\n$ echo {OTHER}\n{UUID}\n")


def test_a_program_that_complains_or_prints_something_else_is_wrong() -> None:
    check_program("print('localhost:8000')", "localhost:8000\n", 8001)
    with pytest.raises(AssertionError):
        check_program("print(1)", "2\n", 8001)
    with pytest.raises(AssertionError):
        check_program("import sys; print(1, file=sys.stderr)", None, 8001)
