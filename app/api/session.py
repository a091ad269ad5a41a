"""The name of the conversation that a request is a part of."""

from __future__ import annotations

from pydantic import BaseModel
from starlette.types import Scope

from app.api.headers import find_header
from app.logging import note
from app.schemas.token_rules import MAX_SESSION_CHARACTERS, is_session_id
from app.serving.errors import InvalidRequest

_HEADER = "X-Session-ID"


def note_session(scope: Scope, body: BaseModel) -> None:
    """Tell the log, and with it the answer's headers, the session of a request: that of the body before that of the
    header. Raises InvalidRequest for a header that names none.
    """
    session: str | None = getattr(body, "session_id", None)
    if session is None:
        session = find_header(scope, b"x-session-id")
        if session is None:
            return
        if not is_session_id(session):
            raise InvalidRequest(
                f"'{_HEADER}' should be 1 to {MAX_SESSION_CHARACTERS} printable ASCII characters", param=_HEADER
            )
    note(session=session)
