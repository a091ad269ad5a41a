"""Text to token ids and back for clients, without the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import orjson

from app.schemas.anthropic import CountTokensRequest
from app.schemas.tokens import DetokenizeRequest, TokenizeRequest
from app.serving.anthropic import read_conversation
from app.serving.chat_prompt import ChatPrompts
from app.serving.chat_unsupported import CHAT_FIELDS
from app.serving.errors import UnsupportedParameter
from app.serving.jobs import FindTarget
from app.serving.limits import ServingLimits
from app.serving.preparing import check_ids
from app.serving.tokenizer import Tokenizer
from app.serving.unsupported import refuse_unsupported

# written as one, a list of millions keeps all other threads waiting
_ITEMS_AT_ONCE = 16 * 1024


class TokenService:
    """Answers of ``/tokenize``, ``/detokenize`` and ``/v1/messages/count_tokens`` as JSON. Blocks in proportion to its
    input; any thread may call.

    prompts: of conversations. allows_kwargs: whether clients may set variables of the chat template.
    Raises InvalidRequest, ModelNotFound, Unavailable.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: ServingLimits,
        find_target: FindTarget,
        prompts: ChatPrompts,
        *,
        allows_kwargs: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._allows_kwargs = allows_kwargs
        self._limits = limits
        self._find_target = find_target

    def tokenize(self, body: TokenizeRequest) -> bytes:
        """An object of ``app.schemas.tokens.Tokens``."""
        self._find_target(body.model)
        ids = self._encode(body)
        head = {"count": len(ids), "max_model_len": self._limits.max_model_len}
        texts = b"null"
        if body.return_token_strs:
            text_of = self._tokenizer.id_to_token_text
            texts = _list_bytes([text_of(token) for token in ids])
        return b'%b,"tokens":%b,"token_strs":%b}' % (orjson.dumps(head)[:-1], _list_bytes(ids), texts)

    def detokenize(self, body: DetokenizeRequest) -> bytes:
        """An object of ``app.schemas.tokens.DetokenizedText``."""
        target = self._find_target(body.model)
        check_ids(body.tokens, target.info.vocab_size, "tokens")
        return orjson.dumps({"prompt": self._tokenizer.decode(body.tokens, skip_special_tokens=False)})

    def count(self, body: CountTokensRequest) -> bytes:
        """An object of ``app.schemas.anthropic.TokenCount``."""
        self._find_target(body.model)
        messages, is_continued = read_conversation(body)
        ids = self._prompts.render(
            messages,
            tools=[],
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
            add_special_tokens=False,
            variables={},
        )
        return orjson.dumps({"input_tokens": len(ids)})

    def _encode(self, body: TokenizeRequest) -> list[int]:
        if body.messages is None:
            text = body.prompt or ""
            return self._tokenizer.encode(text, add_special_tokens=body.add_special_tokens is not False)
        refuse_unsupported(body.model_extra, CHAT_FIELDS)
        if body.chat_template_kwargs and not self._allows_kwargs:
            raise UnsupportedParameter("chat_template_kwargs")
        return self._prompts.render(
            body.messages,
            tools=body.tools,
            add_generation_prompt=body.opens_answer,
            continue_final_message=body.continue_final_message,
            add_special_tokens=body.add_special_tokens is True,
            variables=body.chat_template_kwargs,
        )


def _list_bytes(items: Sequence[int] | Sequence[str]) -> bytes:
    pieces: Iterator[bytes] = (
        orjson.dumps(items[start : start + _ITEMS_AT_ONCE])[1:-1] for start in range(0, len(items), _ITEMS_AT_ONCE)
    )
    return b"[%b]" % b",".join(pieces)
