"""Chat templates: a conversation as the one string that the model was trained to continue.

A template is a Jinja program that comes with the model, from whoever made the model: it runs
in Jinja's sandbox, sees plain strings only, and whatever it raises becomes one error. It can
still waste time (the sandbox bounds a range, not nested loops), but reach nothing.
Rendering follows transformers' ``apply_chat_template`` (v5), character for character; tools
and documents do not exist here. Knows nothing of tokens: see tokenizer.py.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jmoe.errors import CheckpointError, RequestError

CHAT_TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """A compiled chat template.

    Attributes:
      source: the template's text.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        where: object = None,
    ):
        """Compiles a template.

        Args:
          source: the template's text.
          special_tokens: variables such as ``bos_token``; one that is missing renders as "".
          where: the file that the template comes from, for errors.

        Raises:
          CheckpointError: the text is not a template; names the line.
        """
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        # Not only TemplateSyntaxError: deep nesting, literals of 5000 digits.
        except Exception as e:
            line = getattr(e, "lineno", None)
            raise CheckpointError(
                "the chat template is malformed",
                where=where,
                got=f"line {line}: {e}" if line else e,
                do="repair it, or download it again",
            ) from None

    @classmethod
    def find(
        cls, directory: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> "ChatTemplate | None":
        """Finds the template of a model directory, or None where it has none.

        ``chat_template.jinja`` wins over ``chat_template`` in tokenizer_config.json, as in
        transformers; of several named templates there, the one named "default" is meant.

        Args:
          directory: the model directory.
          config: its tokenizer_config.json, {} where there is none.
          special_tokens: see the constructor.

        Raises:
          CheckpointError: the template is unreadable or malformed.
        """
        path = directory / CHAT_TEMPLATE_FILE
        try:
            return cls(path.read_text(encoding="utf-8"), special_tokens, where=path)
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(
                f"{path.name} cannot be read", where=directory, got=e, do="download the file again"
            ) from None
        where = directory / "tokenizer_config.json"
        template = config.get("chat_template")
        if isinstance(template, list):
            try:
                template = {each["name"]: each["template"] for each in template}.get("default")
            except (TypeError, KeyError):
                raise CheckpointError(
                    "chat_template must list named templates",
                    where=where,
                    expected='objects with "name" and "template"',
                ) from None
        if template is None:
            return None
        if not isinstance(template, str):
            raise CheckpointError(
                "chat_template must be text", where=where, got=type(template).__name__
            )
        return cls(template, special_tokens, where=where)

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation.

        Args:
          messages: at least one {"role": ..., "content": ...}, both text.
          add_generation_prompt: end with what starts the assistant's turn, where the
            template has such a thing.

        Raises:
          RequestError: a message is malformed, or the template refuses the conversation
            (roles that do not alternate, say); carries the template's words.
        """
        plain = _checked(messages)
        try:
            return self._template.render(
                messages=plain,
                # None and not missing: templates ask "tools is not none".
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        # The template is a program of somebody else's: it may raise anything.
        except Exception as e:
            raise RequestError(
                "the chat template cannot render these messages",
                got=str(e) or type(e).__name__,
                do="change the messages as it says, or give the prompt as text",
            ) from None


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Copies messages into plain dicts of plain strings, which is all that a template may see."""
    expected = '{"role": text, "content": text}'
    if not isinstance(messages, list | tuple) or not messages:
        got = "no messages" if isinstance(messages, list | tuple) else type(messages).__name__
        raise RequestError(
            "a conversation is a list of messages", got=got, expected=f"[{expected}, ...]"
        )
    for index, message in enumerate(messages):
        got = None
        if not isinstance(message, Mapping):
            got = type(message).__name__
        elif set(message) != {"role", "content"}:
            got = f"keys {', '.join(map(repr, message)) or '(none)'}"
        else:
            for key, value in message.items():
                if not isinstance(value, str):
                    got = f"{key} of type {type(value).__name__}"
        if got is not None:
            raise RequestError(f"message {index} is malformed", got=got, expected=expected)
    # str(...): a subclass of str could carry methods that the sandbox does not know.
    return [{key: "".join(message[key]) for key in ("role", "content")} for message in messages]


class _GenerationTag(Extension):
    """``{% generation %}``: marks the assistant's words for training; means nothing here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope, because in transformers the block is a macro: what it sets stays inside.
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace without private names, which could imitate Python's own protocols."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        Namespace.__setitem__(self, name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not have the attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _new_dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: Jinja's own filter escapes <, > and & for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_new_dict,  # a function: the type itself has methods that change their arguments
        namespace=_Namespace,
    )
    return environment
