"""What goes over the wire of a stream: the events, their chunks, back-pressure, and what comes after it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Serve

RECORDED = json.loads(Path(__file__).with_name("recorded_events.json").read_text())


def by_choice(events: list[str]) -> dict[str, list[str]]:
    """Events in order, sorted by the choice they belong to; choices may interleave in any way."""
    sorted_events: dict[str, list[str]] = {}
    for event in events:
        index = re.search(r'"index":(\d+)', event)
        sorted_events.setdefault(index[1] if index else "none", []).append(event)
    return sorted_events


@pytest.mark.anyio
@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: json.dumps(recorded["request"]))
async def test_events_are_byte_for_byte_those_recorded(serve: Serve, recorded: dict[str, Any]) -> None:
    # recorded from the first version of the server, in which every token was its own task switch and write
    async with serve() as server:
        response = await server.client.post(
            "/v1/completions", json={**recorded["request"], "stream": True}, headers={"x-request-id": "recorded"}
        )
        text = re.sub(r'"created":\d+', '"created":0', response.text)
        events = re.sub(r'"fp_[0-9a-f]+"', '"fp"', text).split("\n\n")
        assert events.pop() == ""
        assert events[-1] == "data: [DONE]"
        assert by_choice(events) == by_choice(recorded["events"])
