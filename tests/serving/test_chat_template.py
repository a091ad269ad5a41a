"""Chat templates: where they are found, that they write what transformers writes, and that none runs wild."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from app.serving.chat_sandbox import ChatEnvironment, Meter, RenderLimit, TemplateRefusal
from app.serving.chat_template import (
    BUILT_IN,
    ChatTemplate,
    TemplateError,
    TemplateSource,
    find_template,
    load_template,
)
from app.serving.errors import InvalidRequest
from app.settings import BUILT_IN_TEMPLATES

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " <b>What</b> is 'é'? & \"why\"\n"},
    {"role": "assistant", "content": "A letter.", "reasoning_content": "hm"},
    {"role": "user", "content": "And in Köln?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 1}}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<of> a city", "parameters": {}}}]

# in the manners of several families of models
REAL = {
    "brackets": """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest if message.role in ('user', 'assistant') %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system is defined %}
{{- '[INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
{{- '[INST] ' ~ message.content ~ ' [/INST]' }}
        {%- endif %}
    {%- elif message.content is not none %}
{{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "headers": """\
{{ bos_token }}{% for message in messages %}
    {% set header = '<|header|>' + message.role + '<|/header|>\\n\\n' %}
    {% if message.tool_calls is defined and message.tool_calls %}
        {% for call in message.tool_calls %}
{{ header }}{{ {"name": call.function.name, "parameters": call.function.arguments} | tojson }}<|call|>
        {% endfor %}
    {% else %}
{{ header + (message.content | trim) + '<|turn|>' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}
""",
    "tools": """\
{%- macro show(tool, depth=0) -%}
{{ '  ' * depth }}- {{ tool.name }}: {{ tool.description | default('none', true) | upper }}
{%- endmacro %}
{%- if tools is not none and tools | length > 0 %}
{%- for tool in tools %}{{ show(tool.function, 1) }}
{{ tool | tojson(indent=2) }}
{%- endfor %}
{%- endif %}
{%- set ns = namespace(last=0, texts=[]) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last == 0 %}{% set ns.last = index %}{% continue %}{% endif %}
    {%- if index == 0 %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if loop.index0 > ns.last and message.reasoning_content %}
<think>{{ message.reasoning_content.strip('\\n') }}</think>{% endif %}
{%- generation %}{{ message.role }}={{ message.get('content') or '-' }}{% endgeneration %}
{%- if not loop.last %},{% else %}.{% endif %}
{%- endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | join(' / ') }}
{{ messages | map(attribute='role') | unique | sort | list }}
{%- for key, value in messages[0].items() %}{{ key }}:{{ value.split(' ')[0] }};{% endfor %}
{{- "%s-%03d" % ("x", 7) }}{{ "{}|{:>4}".format("y", 8) }}{{ 'a.b'.replace('.', '/') | indent(2) }}{{ 7 // 2 ** 1 % 5 }}
""",
    "chatml": BUILT_IN["chatml"][0],
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def render(text: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    template = ChatTemplate(TemplateSource({"default": text}, variables=VARIABLES))
    return template.render(messages or [{"role": "user", "content": "hi"}], variables, 1000)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("has_tools", [False, True])
def test_it_writes_what_transformers_writes(name: str, has_tools: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = TOOLS if has_tools else None
    texts, _ = render_jinja_template(
        conversations=[CONVERSATION], tools=tools, chat_template=REAL[name], add_generation_prompt=True, **VARIABLES
    )
    assert render(REAL[name], CONVERSATION, tools=tools, add_generation_prompt=True) == texts[0]
    assert len(texts[0]) > 90


def test_tools_in_chatml() -> None:
    text = render(BUILT_IN["chatml"][0], CONVERSATION, tools=TOOLS, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief. \n\nThere are functions")
    assert json.dumps(TOOLS[0]) in text
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "n": 1}}\n</tool_call><|im_end|>'
    assert f"<|im_start|>assistant\n{call}\n<|im_start|>tool\nrain<|im_end|>\n" in text
    assert text.count("Be brief") == 1
    assert ChatTemplate(TemplateSource({"default": BUILT_IN["chatml"][0]})).has_tools


DOUBLING = "{{% set ns = namespace(s='a') %}}{{% for i in range(200) %}}{{% set ns.s = {} %}}{{% endfor %}}{}"
BUILDERS = (
    "[ns.s, ns.s]",
    "(ns.s, ns.s)",
    "{'a': ns.s, 'b': ns.s}",
    "dict(a=ns.s, b=ns.s)",
    "[1, 2] | map(attribute='x', default=ns.s) | list",
)
SINKS = (
    "{{ ns.s }}",
    "{{ ns.s | tojson }}",
    "{{ '%s' % ns.s }}",
    "{{ '{}'.format(ns.s) }}",
    "{{ 'x' ~ ns.s }}",
    "{{ ns.s == [1] }}",
)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(60000) %}{% for j in range(60000) %}{% endfor %}{% endfor %}",
        "{% for i in range(60000) %}{% for j in range(60000) %}{{ j }}{% endfor %}{% endfor %}",
        "{% for i in range(60000) %}" + "x" * 10_000 + "{% endfor %}",
        "{% set text %}{% for i in range(60000) %}" + "x" * 10_000 + "{% endfor %}{% endset %}",
        "{{ 'a' * 10 ** 8 }}",
        "{{ 10 ** 8 * 'a' }}",
        "{{ [0] * 10 ** 8 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'a'.ljust(10 ** 9) }}{{ 'a'.center(10 ** 9) }}",
        "{{ '\t'.expandtabs(10 ** 9) }}",
        "{{ '%1000000000d' % 3 }}",
        "{{ '%*d' % (1000000000, 3) }}",
        "{{ '{:1000000000}'.format(3) }}",
        "{{ '{:{}}'.format(3, 1000000000) }}",
        "{{ '%1000000000d' | format(3) }}",
        "{{ 'x' | indent(10 ** 9, true) }}",
        "{{ [1] | tojson(indent=10 ** 9) }}",
        "{{ strftime_now('%1000000000Y') }}",
        "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
        "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
        "{{ ('x' * 100000) | join('y' * 100000) }}",
        "{{ ('y' * 100000).join('x' * 100000) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        DOUBLING.format("ns.s + ns.s", ""),
        DOUBLING.format("ns.s ~ ns.s", ""),
        DOUBLING.format("ns.s * 2", ""),
        "{% set ns = namespace(s='a') %}"
        "{% for i in range(200) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
        *(DOUBLING.format(builder, SINKS[i]) for i, builder in enumerate(BUILDERS)),
        *(DOUBLING.format("[ns.s, ns.s]", sink) for sink in SINKS),
    ],
)
def test_no_template_takes_long_or_grows(text: str) -> None:
    environment = ChatEnvironment()
    template = environment.from_string(text)
    began = time.monotonic()
    with pytest.raises(RenderLimit):
        environment.render(template, {}, Meter(2**20, 0.25))
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ namespace(a=1) }}",
        "{{ lipsum(n=10) }}",
        "{{ missing.field }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% include 'a' %}",
    ],
)
def test_mistakes_are_refusals(text: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template") as refusal:
        render(text)
    assert "/" not in refusal.value.message


def test_a_template_may_refuse() -> None:
    text = "{{ raise_exception('roles must alternate ' + 'x' * 1000) }}"
    with pytest.raises(InvalidRequest, match="roles must alternate") as refusal:
        render(text)
    assert len(refusal.value.message) < 200
    environment = ChatEnvironment()
    with pytest.raises(TemplateRefusal):
        environment.render(environment.from_string("{{ raise_exception('no') }}"), {}, Meter(100, 1))


def test_a_long_conversation_is_within_the_limits() -> None:
    messages = [{"role": "user", "content": "word " * 500}] * 2000
    template = ChatTemplate(TemplateSource({"default": BUILT_IN["chatml"][0]}))
    text = template.render(messages, {"add_generation_prompt": True}, 2500 * 2000)
    assert len(text) > 5_000_000


def test_where_templates_are_found(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    other.mkdir()
    assert find_template(None, model, other) is None
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "config"}
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    found = find_template(None, model, other)
    assert found == TemplateSource({"default": "config"}, ("</s>",), {"bos_token": "<s>", "eos_token": "</s>"})
    (other / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert find_template(None, model, other).texts == {"default": "json"}  # type: ignore[union-attr]
    (other / "chat_template.jinja").write_text("jinja")
    assert find_template(None, model, other).texts == {"default": "jinja"}  # type: ignore[union-attr]
    named = tmp_path / "mine.txt"
    named.write_text("mine")
    assert find_template(str(named), model, other).texts == {"default": "mine"}  # type: ignore[union-attr]
    assert find_template("chatml", other).ends == ("<|im_end|>",)  # type: ignore[union-attr]


def test_the_built_in_names_are_those_of_the_setting() -> None:
    assert tuple(BUILT_IN) == BUILT_IN_TEMPLATES


def test_named_templates(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    source = find_template(None, tmp_path)
    assert source is not None
    template = ChatTemplate(source)
    assert template.render([], {}, 0) == "plain"
    assert template.render([], {"tools": TOOLS}, 0) == "1"
    assert template.has_tools


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"chat_template": 5}', "holds no chat template"),
        ('{"chat_template": [{"name": "a"}]}', "holds no chat template"),
        ("{", "is not JSON"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(TemplateError, match=message):
        find_template(None, tmp_path)


def test_a_checkpoint_whose_template_is_wrong_serves_no_conversations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_text("{{ messages | nothing_such }}")
    assert load_template(None, tmp_path) is None
    assert "nothing_such" in caplog.text
    with pytest.raises(TemplateError, match="nothing_such"):
        load_template(str(path))
    path.write_text("fine")
    template = load_template(None, tmp_path)
    assert template is not None
    assert template.render([], {}, 0) == "fine"


def test_templates_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"not valid.*line 2"):
        ChatTemplate(TemplateSource({"default": "\n{% for %}"}))
    with pytest.raises(TemplateError, match="none is named"):
        ChatTemplate(TemplateSource({"a": "", "b": ""}))
    large = tmp_path / "large.jinja"
    large.write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(TemplateError, match="too large"):
        find_template(str(large))
    large.write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="UTF-8"):
        find_template(str(large))
