"""A tiny byte-level tokenizer for checkpoints that come without one.

Every byte is a token, so any text survives; a few merges keep it honest about multi-byte tokens.
It knows nothing of models: ids at and above `NUM_TOKENS` are simply never produced by encoding.
"""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = 0, 1, 2

# Byte-level spelling: Ġ is a space.
_MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("i", "n"),
    ("Ġ", "the"),
    ("Ġ", "a"),
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("o", "r"),
)
NUM_TOKENS = len(SPECIAL_TOKENS) + 256 + len(_MERGES)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """The tokenizer: special tokens 0 to 2, then the 256 bytes, then the merged tokens."""
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[token] = len(vocab)
    for left, right in _MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    return tokenizer


def byte_tokenizer_files() -> dict[str, bytes]:
    """The tokenizer as a checkpoint carries it: file name to bytes, the same every time."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": [IM_END_ID]}
    return {
        "tokenizer.json": byte_tokenizer().to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2).encode(),
        "generation_config.json": json.dumps(generation_config, indent=2).encode(),
    }
