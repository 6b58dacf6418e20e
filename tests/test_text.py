"""Text of files and strangers reaches a terminal as one harmless line."""

import pytest

from disagg_ray.text import human_seconds, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\r\n\tb\x00", "a\\r\\n\\tb\\x00"),
        ("\x7f\x9b31m", "\\x7f\\x9b31m"),
        ("\ud800", "\\ud800"),
        ("cut\u202etxt.exe\u2066", "cut\\u202etxt.exe\\u2066"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\ufeff\u200f\u061c", "\\ufeff\\u200f\\u061c"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["", "色调艳丽，过曝", "naïve 👩‍👩‍👧", "C:\\new 'x' \"y\"", "a" * 200])
def test_text_that_people_write_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("text", ["a" * 201, "\x1b" * 200, "a" * 10_000_000])
def test_long_text_is_cut_with_an_ellipsis(text: str) -> None:
    assert len(printable(text)) == 200
    assert printable(text).endswith("…")
    assert printable(text, limit=3) == f"{printable(text)[:2]}…"


def test_printable_text_can_be_encoded() -> None:
    assert printable("".join(map(chr, range(0x110000))), limit=10_000_000).encode()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (38, "38 s"), (99.4, "99 s"), (150, "2 min"), (5900, "98 min"), (11_100, "3 h 5 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
