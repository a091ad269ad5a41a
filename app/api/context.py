"""What the routes work with: one object per server, built outside and passed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from app.api.admission import Admission, ByteBudget
from app.api.gate import Gate
from app.api.keys import KeyRing
from app.api.open_requests import OpenRequests
from app.engine.interface import EngineClient, EngineStatus
from app.metrics import ServerMetrics
from app.serving.chat_template import ChatTemplate
from app.serving.completions import CompletionService
from app.serving.errors import Unavailable
from app.serving.limits import ServingLimits
from app.serving.models import ModelCatalog
from app.serving.responses_store import ResponseStore
from app.serving.tokenizer import Tokenizer
from app.serving.tokens import TokenService
from app.settings import Settings

_RETRY_LOADING = 5.0


class Phase(StrEnum):
    """Where in its life a server is."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(slots=True)
class ServerContext:
    """``service`` and ``tokens`` are None, and ``phase`` LOADING, until the model is ready."""

    settings: Settings
    engine: EngineClient
    metrics: ServerMetrics
    service: CompletionService | None = None
    tokens: TokenService | None = None
    phase: Phase = Phase.LOADING
    open_requests: OpenRequests = field(default_factory=OpenRequests)
    gate: Gate = field(default_factory=Gate)
    admission: Admission = field(init=False)
    token_work: ByteBudget = field(init=False)
    catalog: ModelCatalog = field(init=False)
    keys: KeyRing = field(init=False)
    responses: ResponseStore = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings.max_queue, self.settings.max_queue_tokens)
        self.token_work = ByteBudget(self.settings.max_body_size)
        self.keys = KeyRing(self.settings.read_api_keys())
        self.responses = ResponseStore(self.settings.max_stored_responses, self.settings.max_stored_bytes)
        self.catalog = ModelCatalog(self.engine, self.settings.model_names, self.limits)

    @property
    def limits(self) -> ServingLimits:
        """What one request may ask for."""
        settings = self.settings
        return ServingLimits(settings.max_model_len, max_prompts=settings.max_prompts, max_n=settings.max_n)

    def find_obstacle(self) -> Unavailable | None:
        """Why a request sent now would not be admitted; a full queue is no obstacle."""
        if self.phase is Phase.DRAINING:
            return Unavailable("the server is shutting down")
        if self.phase is Phase.LOADING or self.service is None:
            return Unavailable("the model is still loading", retry_after=_RETRY_LOADING)
        if self.engine.status is not EngineStatus.READY:
            return Unavailable("the engine is being started again", retry_after=_RETRY_LOADING)
        if self.stuck_seconds() > self.settings.heartbeat_timeout:
            return Unavailable("the engine does not answer", retry_after=_RETRY_LOADING)
        return None

    def stuck_seconds(self) -> float:
        """How long the engine has shown no life although there is work; 0 while it is idle or being started."""
        has_work = len(self.open_requests) > 0 and self.engine.status is EngineStatus.READY
        return self.engine.heartbeat_age() if has_work else 0.0

    def open_for_requests(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        """The model is ready: take requests from now on, conversations only if there is a template for them."""
        names = self.settings.model_names
        self.service = CompletionService(
            self.engine,
            tokenizer,
            names,
            self.limits,
            self.metrics,
            template=template,
            allows_template_kwargs=self.settings.enable_chat_template_kwargs,
            is_crowded=lambda: self.gate.is_crowded,
        )
        self.tokens = TokenService(
            tokenizer,
            self.limits,
            self.service.find_target,
            self.service.chat.prompts,
            allows_kwargs=self.settings.enable_chat_template_kwargs,
        )
        self.phase = Phase.SERVING

    def require_service(self) -> CompletionService:
        """The service, if a request is admitted now. Raises Unavailable."""
        obstacle = self.find_obstacle()
        if obstacle is not None:
            raise obstacle
        assert self.service is not None
        return self.service

    def require_tokens(self) -> TokenService:
        """The service for text alone, if a request is admitted now. Raises Unavailable."""
        self.require_service()
        assert self.tokens is not None
        return self.tokens

    def check_queue(self) -> None:
        """Raises Overloaded when there is no place for one more sequence."""
        self.admission.check(self.engine.info.max_num_seqs)
