"""Writes down the OpenAPI document, with which a test compares what the server tells of itself: ``make docs``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from app.api.app import document

RECORDED = Path(__file__).resolve().parents[1] / "tests" / "api" / "openapi.json"


def render() -> str:
    """The document as text, the same for the same routes."""
    return json.dumps(document(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> int:
    RECORDED.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
