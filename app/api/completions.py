"""The life of one request for tokens: read, admitted, tokenized, generated while the client is watched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import closing

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from app.api.admission import Ticket
from app.api.body import read_json_body
from app.api.connection import Connection, find_connection
from app.api.context import ServerContext
from app.api.deadline import Deadline, read_deadline
from app.api.dependencies import context_of
from app.api.errors import HttpError, as_request_error, error_response
from app.api.observer import CompletionObserver
from app.api.open_requests import ClientGone, OpenRequest
from app.api.session import note_session
from app.api.streaming import ClientStuck, EventStream
from app.logging import current_request_id, note
from app.schemas.wire import Body
from app.serving.completions import CompletionService
from app.serving.errors import RequestError
from app.serving.jobs import Job
from app.serving.parsing import parse_request
from app.serving.prepared import PreparedCompletion

# parsing this many bytes takes about a millisecond, for which no thread is worth its while
_BYTES_IN_LOOP = 64 * 1024

logger = logging.getLogger(__name__)


async def answer(
    request: Request, model: type[Body], make_job: Callable[[CompletionService, Body], Job]
) -> CompletionAnswer:
    """What a route answers whose body is ``model``. Raises RequestError for what is refused before it is admitted."""
    context = context_of(request)
    # refused before a byte of the body is read, and once more when all of it is here
    context.require_service()
    context.check_queue()
    settings = context.settings
    deadline = read_deadline(request.scope, settings.max_request_seconds)
    timeout = deadline.shorten(settings.body_timeout)
    try:
        raw = await read_json_body(request.scope, request.receive, settings.max_body_size, timeout)
    except HttpError as error:
        raise (deadline.explain(error) if timeout < settings.body_timeout else error) from None
    is_short = len(raw) <= _BYTES_IN_LOOP
    body = parse_request(model, raw) if is_short else await asyncio.to_thread(parse_request, model, raw)
    note_session(request.scope, body)
    service = context.require_service()
    return CompletionAnswer(context, service, make_job(service, body), deadline)


class CompletionAnswer(Response):
    """Answers one request, streaming or not. Whichever way it ends, its rows and its place in the queue are free."""

    def __init__(self, context: ServerContext, service: CompletionService, job: Job, deadline: Deadline) -> None:
        super().__init__()
        self._context = context
        self._service = service
        self._job = job
        self._deadline = deadline
        self._connection: Connection | None = None
        self._events: EventStream | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ticket = self._enter()
        self._connection = find_connection(scope)
        try:
            with self._context.open_requests.track(self._connection, receive) as request, self._deadline.limit(request):
                content = await self._generate(ticket, request, send)
        except ClientGone:
            raise
        except ClientStuck:
            note(finish="client stuck")
            self._cut_connection()
        except Exception as error:
            await self._fail(error, scope, receive, send)
        else:
            await self._end(content, scope, receive, send)
        finally:
            ticket.close()
            if self._events is not None:
                self._events.close()

    def _enter(self) -> Ticket:
        num_slots = self._context.engine.info.max_num_seqs
        return self._context.admission.enter(num_slots, self._job.num_sequences, self._job.estimated_tokens)

    async def _generate(self, ticket: Ticket, request: OpenRequest, send: Send) -> bytes | None:
        """The whole answer, or None after it was streamed."""
        prepared = await self._prepare()
        ticket.count_tokens(prepared.num_prompt_tokens)
        observer = CompletionObserver(self._context.metrics, ticket)
        if not prepared.is_stream:
            return await self._service.complete(prepared, observer)
        settings = self._context.settings
        self._events = EventStream(
            self._connection, send, request, settings.ping_interval, settings.write_timeout, prepared.last_words
        )
        with closing(self._service.stream(prepared, self._events, observer)) as run:
            await self._events.follow(run)
        return None

    async def _prepare(self) -> PreparedCompletion:
        if self._job.is_short:
            return self._job.prepare(current_request_id())
        return await asyncio.to_thread(self._job.prepare, current_request_id())

    async def _end(self, content: bytes | None, scope: Scope, receive: Receive, send: Send) -> None:
        if content is not None:
            await Response(content, media_type="application/json")(scope, receive, send)
        elif self._events is not None:
            await self._finish(self._events, None)

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        if not isinstance(error, RequestError):
            logger.error("completion failed", exc_info=error)
        told = as_request_error(error)
        if self._events is not None and self._events.is_started:
            note(error=told.code)
            await self._finish(self._events, told)
        else:
            await error_response(told)(scope, receive, send)

    async def _finish(self, events: EventStream, error: RequestError | None) -> None:
        try:
            await events.finish(error)
        except TimeoutError:
            self._cut_connection()

    def _cut_connection(self) -> None:
        if self._connection is not None:
            self._connection.cut()
