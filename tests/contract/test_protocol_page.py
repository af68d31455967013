"""`docs/protocol.md` names the version, the messages and the fields of the protocol."""

import re
from typing import get_args

import pytest

from support.paths import REPOSITORY
from tp_runtime.wire import protocol

PAGE = (REPOSITORY / "docs" / "protocol.md").read_text()
NAMES = re.compile(r"`(\w+)`")


def _rows() -> list[tuple[str, list[str]]]:
    """Of the page's two tables of messages: each message, and its fields."""
    tables = re.findall(
        r"^\| (?:engine to every rank|rank to engine) \|.*?^$", PAGE, re.MULTILINE | re.DOTALL
    )
    assert len(tables) == 2
    rows = []
    for table in tables:
        for line in table.splitlines()[2:]:
            _, messages, fields, *_ = line.split("|")
            without_remarks = re.sub(r"\([^()]*\)", "", fields)
            rows += [(each, NAMES.findall(without_remarks)) for each in NAMES.findall(messages)]
    return rows


@pytest.mark.parametrize(("message", "fields"), _rows())
def test_fields_are_those_of_the_message(message: str, fields: list[str]) -> None:
    assert fields == list(getattr(protocol, message).__struct_fields__)


def test_all_messages_are_there() -> None:
    kinds = {*get_args(protocol.Request), *get_args(protocol.Reply)}
    assert {message for message, _ in _rows()} == {kind.__name__ for kind in kinds}


def test_the_version_is_todays() -> None:
    assert f"version {protocol.VERSION}." in PAGE
