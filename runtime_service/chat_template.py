"""A conversation as the model was taught to read it: the checkpoint's own Jinja template.

Templates come with checkpoints, from anywhere: they run in Jinja's sandbox, with the same few
names that Hugging Face transformers gives them.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from shared.errors import InvalidField, InvalidModel

# Those of a tokenizer's configuration that templates know by name.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
# What is not for requests to say beside their messages.
_RESERVED = frozenset(
    (*SPECIAL_TOKENS, "messages", "add_generation_prompt", "continue_final_message", "tools")
)
# Characters of what a template says of a conversation that it refuses.
_MOST_SAID = 300


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja text.
        special_tokens: `bos_token`, `eos_token` and so on, as text.
    Raises:
        InvalidModel: it is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _SafeNamespace,
        }
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise InvalidModel(problem=f"its chat template is broken: {error}") from error
        self._arguments = sorted(variables - _RESERVED)

    def render(self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any]) -> str:
        """The prompt that asks for the next turn.

        Args:
            arguments: further variables of the template, of JSON's types.
        Raises:
            InvalidField: the template does not take these messages, or reads no such variable.
        """
        self._check_arguments(arguments)
        variables = {"documents": None, **arguments, **self._special_tokens}
        try:
            return self._template.render(
                variables,
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
            )
        # A template is a program that the model's authors wrote: anything that it trips over is
        # its refusal of this conversation. Values that it does not expect may lack what it looks for,
        # be nested deeper than it goes, or make it write more than there is memory for.
        except (
            jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError,
            AttributeError, RecursionError, MemoryError,
        ) as error:  # fmt: skip
            # It may quote what it was given, of any length and over any number of lines.
            said = " ".join(str(error).split())[:_MOST_SAID] or type(error).__name__
            problem = f"the model's chat template refuses it: {said}"
            raise InvalidField(field="start.chat", problem=problem) from error

    def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        name = next((name for name in arguments if name not in self._arguments), None)
        if name is None:
            return
        if name in _RESERVED:
            problem = f"{name} is not for requests to set"
        else:
            known = ", ".join(self._arguments) or "nothing but messages"
            problem = f"the model's chat template reads no {name[:64]!r}; it reads {known}"
        raise InvalidField(field="start.chat.template_arguments", problem=problem)


class _GenerationBlock(Extension):
    """`{% generation %}` marks answers for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """Jinja's namespace, without attributes that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Like Jinja's own: a template may well say `namespace(self=...)`.
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models were not taught.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
