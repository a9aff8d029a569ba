"""Chat templates: transformers' text, one error for each mistake, and no way out."""

from datetime import datetime

import pytest

from jmoe.errors import CheckpointError, RequestError
from jmoe.store.chat_template import ChatTemplate

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": "Say <b>hé</b> & 'go'"},
    {"role": "assistant", "content": " hé\n"},
    {"role": "user", "content": "again 😀"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be short."}, *TALK]

MIXTRAL = """{{ bos_token }}{% for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content']|trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

CHATML = """{% if tools is not none or documents is not none or pad_token %}
    {{ raise_exception('no tools here') }}
{% endif %}
{% for message in messages %}
    <|im_start|>{{ message.role }}
    {{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

TOJSON = """{%- set ns = namespace(turns=0) -%}
{%- for message in messages -%}
    {%- set ns.turns = ns.turns + 1 -%}
    {{ message | tojson }}{{ dict(a=ns.turns) | tojson(indent=2) }}
{%- endfor -%}
{{ messages | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}"""

GENERATION = """{%- set name = 'outer' -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if loop.index > 3 -%}{%- break -%}{%- endif -%}
    {%- if message.role == 'assistant' -%}
        {% generation %}
        {% set name = 'inner' %}
        {{ message.content }}{{ name }}{{ loop.index }}
        {% endgeneration %}
    {%- else -%}
        {{ message.content }}{{ name }}
    {%- endif -%}
{%- endfor -%}"""


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", [TALK, WITH_SYSTEM], ids=["talk", "with_system"])
@pytest.mark.parametrize(
    "source", [MIXTRAL, CHATML, TOJSON, GENERATION], ids=["mixtral", "chatml", "tojson", "tags"]
)
def test_renders_as_transformers_does(source, messages, add_generation_prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    from jinja2 import TemplateError

    template = ChatTemplate(source, SPECIAL_TOKENS)
    try:
        (theirs,), _ = utils.render_jinja_template(
            conversations=[messages],
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            **SPECIAL_TOKENS,
        )
    except TemplateError as e:
        with pytest.raises(RequestError, match=str(e)):
            template.render(messages, add_generation_prompt=add_generation_prompt)
    else:
        assert template.render(messages, add_generation_prompt=add_generation_prompt) == theirs


def test_renders_a_mixtral_conversation():
    text = ChatTemplate(MIXTRAL, SPECIAL_TOKENS).render(TALK)
    assert text == "<s> [INST] Say <b>hé</b> & 'go' [/INST] hé</s> [INST] again 😀 [/INST]"


def test_a_generation_block_keeps_its_variables_to_itself():
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert ChatTemplate(source).render(TALK) == "21"


def test_tells_the_date():
    text = ChatTemplate("{{ strftime_now('%Y') }}").render(TALK)
    assert abs(int(text) - datetime.now().year) <= 1


def test_the_words_of_a_refusing_template_reach_the_user():
    with pytest.raises(RequestError, match="Roles must alternate") as caught:
        ChatTemplate(MIXTRAL).render(WITH_SYSTEM)
    assert caught.value.do is not None


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("{{ bos_token }}\n{% for m in messages %}\n{{ m.content }", "line 3"),
        ("one\n{% endfor %}", "line 2"),
        ("{{ bos_token | no_such_filter }}", "no_such_filter"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("{{ " + "1" * 5000 + " }}", "digits"),
    ],
)
def test_a_malformed_template_is_a_damaged_checkpoint(source, line):
    with pytest.raises(CheckpointError, match=line):
        ChatTemplate(source, where="tokenizer_config.json")


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "''['__class__']",
        "'' | attr('__class__')",
        "messages.__class__.__mro__",
        "messages[0].get.__self__.__class__",
        "raise_exception.__globals__",
        "strftime_now.__code__.co_consts",
        "dict.__subclasses__()",
        "cycler.__init__.__globals__",
        "lipsum.__globals__['os']",
        "'{0.__class__.__mro__}'.format('')",
        "('{0.__class__.__mro__}' | attr('format'))('')",
        "['{0.__class__}'] | map('format', '') | first",
        "messages.append(messages[0])",
        "messages[0].update(role='system')",
        "dict.update(messages[0], role='system')",
        "namespace(__class__=1)",
        "self.__init__.__globals__",
        "self._TemplateReference__context.environment",
    ],
)
def test_a_template_does_not_get_out_of_the_sandbox(expression):
    messages = [dict(message) for message in TALK]
    template = ChatTemplate("{{ " + expression + " }}")
    try:
        text = template.render(messages)
    except RequestError:
        pass
    else:
        # What the sandbox hides renders as nothing, or stays a format string.
        assert text in ("", "{0.__class__}")
    assert messages == TALK


def test_a_namespace_takes_no_private_names():
    source = "{% set ns = namespace() %}{% set ns.__call__ = raise_exception %}"
    with pytest.raises(RequestError, match="__call__"):
        ChatTemplate(source).render(TALK)


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "Range too big"),
        ("{{ nobody.content }}", "'nobody' is undefined"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_what_fails_while_rendering_is_one_error(source, got):
    with pytest.raises(RequestError, match=got):
        ChatTemplate(source).render(TALK)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "got: no messages"),
        ("hello", "got: str"),
        (TALK[0], "got: dict"),
        ([TALK[0], "hello"], "message 1 is malformed\n  got: str"),
        ([{"role": "user"}], "message 0 is malformed\n  got: keys 'role'"),
        ([*TALK, {"role": "user", "content": None}], "message 3 .*\n.*content of type NoneType"),
        ([{"role": 1, "content": "hello"}], "role of type int"),
        ([{"role": "user", "content": "hello", "name": "me"}], "'name'"),
        ([{}], "none"),
    ],
)
def test_a_malformed_message_is_named(messages, text):
    with pytest.raises(RequestError, match=text):
        ChatTemplate(CHATML).render(messages)


def test_a_string_of_a_richer_type_becomes_plain():
    class Rich(str):
        def read(self):
            return "secret"

    source = "{{ messages[0].content }}{{ messages[0].content.read is defined }}"
    assert ChatTemplate(source).render([{"role": "user", "content": Rich("x")}]) == "xFalse"
