"""The page for people says what the tests say."""

from __future__ import annotations

from promises import PAGE, page


def test_the_page_lists_every_promise() -> None:
    assert PAGE.read_text() == page(), "python -m tests.hostile.promises writes it"
