"""What the serving room raises; the HTTP room turns each into one response body.

RequestError
  InvalidRequest            400  the body or one of its values is wrong
    UnsupportedParameter    400  a field that is known, but not served
    ContextLengthExceeded   400  longer than the operator allows
  ModelNotFound             404
  ClientTooSlow             408  what was asked for piles up, as nobody reads it
  Overloaded                429  healthy, but full; with ``retry_after``
  Unavailable               503  loading, draining or without an engine; with ``retry_after``
  ServerFailure             500  our fault; the next request works
"""

from __future__ import annotations

MAX_ECHOED_CHARACTERS = 100


def quote(value: object) -> str:
    """A value of the client's for a message: escaped, and at most 100 characters of it."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > MAX_ECHOED_CHARACTERS:
        text = text[: MAX_ECHOED_CHARACTERS - 3] + "..."
    return repr(text)


class RequestError(Exception):
    """A request that is not answered with a result.

    status: HTTP status. type: OpenAI's class of errors. param: the field at fault. code: a word for programs.
    retry_after: seconds after which trying again makes sense.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else type(self).code
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The response body, the same on every path."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(RequestError):
    """The body or one of its values is wrong."""

    status = 400
    type = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    """A known field that would have an effect, but is not served."""

    code = "unsupported_parameter"

    def __init__(self, param: str) -> None:
        super().__init__(f"'{param}' is not supported by this server; leave it out", param=param)


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output together are longer than the operator allows."""

    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    """No model of that name is served."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"the model {quote(name)} does not exist", param="model")


class ClientTooSlow(RequestError):
    """What was asked for piles up, as nobody reads it."""

    status = 408
    type = "timeout_error"
    code = "client_too_slow"


class Overloaded(RequestError):
    """Healthy, but full."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(RequestError):
    """Loading, draining, or no engine to ask."""

    status = 503
    type = "service_unavailable_error"
    code = "server_is_unavailable"

    def __init__(self, message: str, *, retry_after: float | None = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class ServerFailure(RequestError):
    """Our fault."""

    code = "server_failure"
