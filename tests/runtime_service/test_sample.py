"""What waits to be read of a sample comes in pieces, each with the text of its own tokens."""

import pytest

from runtime_service.detokenizer import Detokenizer, TokenBytes
from runtime_service.sample import MAX_EVENT_LOGPROBS, MAX_EVENT_TOKENS, Sample
from runtime_service.sample_text import SampleText
from runtime_service.scheduling.output import TokenLogprobs
from tests.runtime_service.daemon import TOKENIZER


@pytest.mark.parametrize("with_logprobs", [False, True])
def test_text_can_be_gone_on_with_after_every_piece(with_logprobs: bool) -> None:
    """A reader that has the first pieces alone has the tokens of their text, and no others."""
    ids = TOKENIZER.encode("wörld 🙂 " * 1500).ids
    detokenizer = Detokenizer(TokenBytes(TOKENIZER))
    sample = Sample(SampleText(detokenizer, None, 0))
    for token_id in ids:
        sample.make_room()
        sample.text.feed([token_id])
        sample.token_ids.append(token_id)
        if with_logprobs:
            sample.logprobs.append(TokenLogprobs(token_id, -1.0, 1, ()))
    chunks = [event.tokens for event in sample.take_events("a", 0)]
    limit = MAX_EVENT_LOGPROBS if with_logprobs else MAX_EVENT_TOKENS
    assert len(chunks) == -(-len(ids) // limit)
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == ids
    assert "".join(chunk.text for chunk in chunks) == TOKENIZER.decode(ids)
    alone = Detokenizer(TokenBytes(TOKENIZER))
    for chunk in chunks:
        assert chunk.text == alone.feed_all(chunk.token_ids)
        assert len(chunk.logprobs) == (len(chunk.token_ids) if with_logprobs else 0)
    assert not sample.has_news
