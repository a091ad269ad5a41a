"""Control tokens of the template are tokens, those of clients are text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from app.serving.chat_prompt import ChatPrompts
from app.serving.chat_template import ChatTemplate, TemplateSource
from app.serving.chat_tokens import ControlTokens
from app.serving.errors import InvalidRequest
from app.serving.tokenizer import Tokenizer
from tests.serving.conftest import make_byte_fallback, train_byte_level

CONTROL = ["<|endoftext|>", "<|open|>", "<|close|>", "<|opener|>"]


def with_control(backend: Backend) -> Backend:
    backend.add_special_tokens(
        ["<|open|>", AddedToken("<|close|>", lstrip=True, rstrip=True, special=True), "<|opener|>"]
    )
    return backend


TOKENIZER = Tokenizer(with_control(train_byte_level()))
REFERENCE = Tokenizer(with_control(train_byte_level()), special_tokens_in_text=True)
TOKENS = ControlTokens(TOKENIZER)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*CONTROL, "<|", "|>", "open", " ", "\n", "the fox", "日本", "\ufdd0", "\ufdd1"]), st.text()
    ),
    max_size=8,
).map("".join)


@given(TEXTS)
def test_a_template_is_read_as_the_library_reads_it(text: str) -> None:
    text = text.replace("\ufdd0", "")
    assert TOKENS.encode(text, add_special_tokens=False) == REFERENCE.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("space", [chr(point) for point in range(0x3100) if chr(point).isspace()])
def test_white_space_beside_a_token_is_what_the_library_takes_for_it(space: str) -> None:
    text = f"a{space}<|close|>{space}b"
    assert TOKENS.encode(text, add_special_tokens=False) == REFERENCE.encode(text, add_special_tokens=False)


@given(TEXTS, TEXTS)
def test_what_a_client_writes_is_text(one: str, two: str) -> None:
    shielded = TOKENS.shield({"a": [one, {"b": two}], "c": 5})
    assert TOKENS.reveal(shielded["a"][0]) == one
    assert TOKENS.reveal(shielded["a"][1]["b"]) == two
    assert shielded["c"] == 5
    ids = TOKENS.encode(f"<|open|>{shielded['a'][0]}<|opener|>{shielded['a'][1]['b']}", add_special_tokens=False)
    assert [index for index in ids if index in TOKENIZER.special_ids] == [
        TOKENS.id_of("<|open|>"),
        TOKENS.id_of("<|opener|>"),
    ]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == f"<|open|>{one}<|opener|>{two}"


def test_a_forged_mark_says_nothing_new() -> None:
    # a client who writes the mark itself gets its characters
    ids = TOKENS.encode(TOKENS.shield("\ufdd00\ufdd1"), add_special_tokens=False)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "\ufdd00\ufdd1"
    # marks of numbers that there are not
    assert TOKENS.reveal("\ufdd0999\ufdd1") == "\ufdd0999\ufdd1"


def test_spaces_do_not_make_it_slow() -> None:
    began = time.perf_counter()
    TOKENS.encode(" " * 200_000 + "x" + "\n" * 200_000 + "<|close|>", add_special_tokens=False)
    assert time.perf_counter() - began < 5


def test_a_frame_is_added_where_it_is_asked_for() -> None:
    backend = with_control(train_byte_level())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|open|>",
        special_tokens=[("<|endoftext|>", 0), ("<|open|>", backend.token_to_id("<|open|>"))],
    )
    tokens = ControlTokens(Tokenizer(backend))
    plain = tokens.encode("the<|close|>fox", add_special_tokens=False)
    framed = tokens.encode("the<|close|>fox", add_special_tokens=True)
    assert framed == [0, *plain, backend.token_to_id("<|open|>")]
    assert plain == REFERENCE.encode("the<|close|>fox", add_special_tokens=False)


def test_other_vocabularies() -> None:
    tokenizer = Tokenizer(make_byte_fallback())
    tokens = ControlTokens(tokenizer)
    ids = tokens.encode(f"<s>the dog{tokens.shield('</s>')}</s>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (tokens.id_of("<s>"), tokens.id_of("</s>"))
    assert ids.count(tokens.id_of("</s>") or -1) == 1


def prompts(text: str, tokenizer: Tokenizer = TOKENIZER) -> ChatPrompts:
    return ChatPrompts(tokenizer, ChatTemplate(TemplateSource({"default": text})))


SHOW = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"


def render(text: str, *messages: tuple[str, str], **fields: bool) -> str:
    checked = [{"role": role, "content": content} for role, content in messages]
    return TOKENIZER.decode(prompts(text).render(checked, **fields), skip_special_tokens=False)  # type: ignore[arg-type]


def test_developers_are_system_where_the_template_knows_none() -> None:
    assert render(SHOW, ("developer", "a")) == "[system]a"
    assert render(SHOW + "{# developer #}", ("developer", "a")) == "[developer]a"


def test_the_last_message_is_cut_where_it_ends() -> None:
    messages = (("user", "a"), ("assistant", " b "))
    assert render(SHOW + "[end]", *messages, continue_final_message=True) == "[user]a[assistant]b "
    with pytest.raises(InvalidRequest, match="does not show"):
        render("fixed", *messages, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="with content"):
        render(SHOW, ("user", ""), continue_final_message=True)


def test_arguments_of_calls_are_objects_for_templates() -> None:
    text = "{% for c in messages[0].tool_calls %}{{ c.function.arguments is mapping }},{% endfor %}"
    calls = [
        {"id": "i", "type": "function", "function": {"name": "f", "arguments": a}} for a in ('{"a": 1}', "5", "no")
    ]
    ids = prompts(text).render([{"role": "assistant", "content": None, "tool_calls": calls}])
    assert TOKENIZER.decode(ids) == "True,False,False,"
