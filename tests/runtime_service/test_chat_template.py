"""Chat templates are foreign programs: they are boxed in, and their refusals are the client's."""

from typing import Any

import pytest

from compiler_service.checkpoints.byte_tokenizer import byte_tokenizer_files
from runtime_service.chat_template import ChatTemplate
from runtime_service.text import ModelText
from shared.errors import InvalidField, InvalidModel

USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ raise_exception('Roles must alternate') }}",
        "{{ messages[5].content.x }}",
        "{{ messages[0].content / 0 }}",
    ],
)
def test_template_that_oversteps_is_a_clear_refusal(source: str) -> None:
    with pytest.raises(InvalidField, match=r"start\.chat: the model's chat template refuses it"):
        ChatTemplate(source, {}).render(USER, {})


def test_raise_exception_reaches_the_client() -> None:
    with pytest.raises(InvalidField, match="Roles must alternate"):
        ChatTemplate("{{ raise_exception('Roles must alternate') }}", {}).render(USER, {})


def test_broken_template_is_a_broken_model() -> None:
    with pytest.raises(InvalidModel, match="chat template is broken"):
        ChatTemplate("{% for %}", {})


def test_time_is_told() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(USER, {}).startswith("20")


def test_messages_of_the_caller_are_left_alone() -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidField):
        ChatTemplate("{{ messages[0].update(role='x') }}", {}).render(messages, {})
    assert messages == USER


# As Qwen3's has it, and Llama 3.1's.
ARGUMENTS = (
    "{% if not date_string is defined %}{% set date_string = 'today' %}{% endif %}"
    "{{ bos_token }}{{ messages[0].content }} {{ date_string }}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% for one in documents or [] %} {{ one | tojson }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "<s>hi today"),
        ({"enable_thinking": False}, "<s>hi today<think></think>"),
        ({"enable_thinking": True, "date_string": "May"}, "<s>hi May"),
        ({"documents": [{"b": 1, "a": 2**70}, 1.0]}, f'<s>hi today {{"b": 1, "a": {2**70}}} 1.0'),
    ],
)
def test_template_reads_what_it_is_given(arguments: dict[str, Any], text: str) -> None:
    assert ChatTemplate(ARGUMENTS, {"bos_token": "<s>"}).render(USER, arguments) == text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("messages", "messages is not for requests to set"),
        ("bos_token", "bos_token is not for requests to set"),
        ("eos_token", "eos_token is not for requests to set"),
        ("tools", "tools is not for requests to set"),
        ("add_generation_prompt", "add_generation_prompt is not for requests to set"),
        ("enable_thinkng", "no 'enable_thinkng'; it reads date_string, documents, enable_thinking"),
        ("raise_exception", "reads no 'raise_exception'"),
        ("x" * 1000, f"reads no {'x' * 64!r}"),
        ("", "reads no ''"),
    ],
)
def test_what_is_not_read_or_not_for_requests_is_refused(name: str, says: str) -> None:
    """An argument without effect would be a question that is not answered."""
    with pytest.raises(InvalidField, match=r"start\.chat\.template_arguments") as refused:
        ChatTemplate(ARGUMENTS, {"bos_token": "<s>"}).render(USER, {name: "x"})
    assert says in str(refused.value)


def test_template_that_reads_nothing_says_so() -> None:
    with pytest.raises(InvalidField, match="it reads nothing but messages"):
        ChatTemplate("{{ messages }}", {}).render(USER, {"enable_thinking": False})


def test_values_that_the_template_does_not_expect_are_its_refusal() -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    for source, value in (
        ("{{ x | dictsort }}", [1]),
        ("{{ x | tojson }}", nested),
        ("{{ x.a.b }}", 1),
        ("{{ x.append(1) }}", []),
        ("{{ x.__class__.__mro__ }}", {}),
    ):
        with pytest.raises(InvalidField, match="the model's chat template refuses it"):
            ChatTemplate(source, {}).render(USER, {"x": value})


def test_refusal_is_a_short_line_whatever_the_template_says() -> None:
    for source, value in (
        ("{{ raise_exception(x) }}", "no\nsuch " * 10_000),
        ("{{ x | center(2 ** 62) }}", "more than any memory"),
    ):
        with pytest.raises(InvalidField, match="refuses it: ") as refused:
            ChatTemplate(source, {}).render(USER, {"x": value})
        problem = refused.value.fields["problem"]
        assert len(problem) < 400
        assert "\n" not in problem


def test_chat_is_refused_when_the_model_has_no_template() -> None:
    files = byte_tokenizer_files()
    files["tokenizer_config.json"] = b"{}"
    with pytest.raises(InvalidField, match="no chat template"):
        ModelText(files).encode_chat(USER, {})


@pytest.mark.parametrize("content", [b"xx", b"{}", b"[]"])
def test_broken_tokenizer_is_a_broken_model(content: bytes) -> None:
    with pytest.raises(InvalidModel, match=r"tokenizer\.json is broken"):
        ModelText({"tokenizer.json": content})
