"""Completions from body to answer, whole or streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache

from app import __version__
from app.engine.interface import EngineClient, EngineError
from app.engine.request import ModelInfo
from app.schemas.chat import ChatRequest
from app.schemas.completions import CompletionRequest
from app.serving.chat_template import ChatTemplate
from app.serving.chat_translate import ChatJob, ChatTranslator
from app.serving.errors import ModelNotFound
from app.serving.failures import request_error
from app.serving.jobs import CompletionJob, Job
from app.serving.limits import ServingLimits
from app.serving.observer import CompletionObserver, GapObserver
from app.serving.outlet import Outlet
from app.serving.prepared import PreparedCompletion
from app.serving.preparing import Preparation, Target
from app.serving.run import CompletionRun
from app.serving.tokenizer import Tokenizer
from app.serving.translate import Translator
from app.serving.turns import Turns

__all__ = ["CompletionRun", "CompletionService"]


class CompletionService:
    """Completions of one served model.

    engine: what generates. model_names: the names that requests may use, the first for requests that use none.
    observer: told of gaps between tokens, for metrics. template: of chats, None for a model that has none.
    allows_template_kwargs: clients may set variables of the template. is_crowded: whether requests wait to be begun.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        model_names: Sequence[str],
        limits: ServingLimits | None = None,
        observer: GapObserver | None = None,
        *,
        template: ChatTemplate | None = None,
        allows_template_kwargs: bool = False,
        is_crowded: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model_names = tuple(model_names)
        preparation = Preparation(limits or ServingLimits(), tokenizer)
        self._translator = Translator(tokenizer, preparation)
        self.chat = ChatTranslator(tokenizer, preparation, template, allows_kwargs=allows_template_kwargs)
        self._turns = Turns(observer, is_crowded)

    def job(self, body: CompletionRequest) -> Job:
        """A request of ``/v1/completions``."""
        return CompletionJob(body, self._translator, self.find_target)

    def chat_job(self, body: ChatRequest) -> Job:
        """A request of ``/v1/chat/completions``."""
        return ChatJob(body, self.chat, self.find_target)

    def find_target(self, model: str | None) -> Target:
        """The model of that name. Raises ModelNotFound, and Unavailable while none is loaded."""
        name = model or self._model_names[0]
        if name not in self._model_names:
            raise ModelNotFound(name)
        try:
            info = self._engine.info
        except EngineError as error:
            raise request_error(error) from error
        return Target(info, name, _fingerprint(info))

    async def complete(self, prepared: PreparedCompletion, observer: CompletionObserver | None = None) -> bytes:
        """The whole answer as JSON. Cancelling frees the engine's rows. Raises RequestError."""
        run = self._start(prepared, None, observer)
        try:
            await run.done
            run.check()
            return run.answer()
        finally:
            run.close()

    def stream(
        self, prepared: PreparedCompletion, outlet: Outlet, observer: CompletionObserver | None = None
    ) -> CompletionRun:
        """Begin to write the answer in chunks. The run must be closed in any case. Raises RequestError."""
        return self._start(prepared, outlet, observer)

    def _start(
        self, prepared: PreparedCompletion, outlet: Outlet | None, observer: CompletionObserver | None
    ) -> CompletionRun:
        return CompletionRun(self._engine, self._tokenizer, self._turns, prepared, outlet, observer)


@lru_cache(maxsize=4)
def _fingerprint(info: ModelInfo) -> str:
    """Changes when the same seed may give other tokens: with the model, its arithmetic or this server."""
    parts = (__version__, info.architecture, info.num_parameters, info.dtype, info.state_dtype, info.device)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]
