"""Chat templates are foreign programs: they are boxed in, and their refusals are the client's."""

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
        ChatTemplate(source, {}).render(USER)


def test_raise_exception_reaches_the_client() -> None:
    with pytest.raises(InvalidField, match="Roles must alternate"):
        ChatTemplate("{{ raise_exception('Roles must alternate') }}", {}).render(USER)


def test_broken_template_is_a_broken_model() -> None:
    with pytest.raises(InvalidModel, match="chat template is broken"):
        ChatTemplate("{% for %}", {})


def test_time_is_told() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(USER).startswith("20")


def test_messages_of_the_caller_are_left_alone() -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidField):
        ChatTemplate("{{ messages[0].update(role='x') }}", {}).render(messages)
    assert messages == USER


def test_chat_is_refused_when_the_model_has_no_template() -> None:
    files = byte_tokenizer_files()
    files["tokenizer_config.json"] = b"{}"
    with pytest.raises(InvalidField, match="no chat template"):
        ModelText(files).encode_chat(USER)


@pytest.mark.parametrize("content", [b"xx", b"{}", b"[]"])
def test_broken_tokenizer_is_a_broken_model(content: bytes) -> None:
    with pytest.raises(InvalidModel, match=r"tokenizer\.json is broken"):
        ModelText({"tokenizer.json": content})
