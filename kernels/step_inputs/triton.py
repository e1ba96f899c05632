"""A step's packed inputs, made on the device from its message and the tables (see layout.py).

Nothing here is decided by the host but row, start and number of tokens of each sequence: what an earlier step drew is
read from the token table, which its sampler wrote.
"""

import triton
import triton.language as tl


@triton.jit
def copy_words(source, destination, count, BLOCK: tl.constexpr):
    """`count` words from the host's memory to the device's, or back."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(source + i, mask=i < count, other=0, cache_modifier=".cv")
    tl.store(destination + i, words, mask=i < count)


@triton.jit
def write_tables(
    message, tables, writes_at,
    WRITE_FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a write: (first word in the tables, first word in the message, number of words)."""
    write = message + writes_at + tl.program_id(0) * WRITE_FIELDS
    to = tl.load(write)
    source = tl.load(write + 1)
    count = tl.load(write + 2)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        is_word = i < count
        words = tl.load(message + source + i, mask=is_word, other=0)
        tl.store(tables + to + i, words, mask=is_word)


@triton.jit
def step_inputs(
    message, tokens, blocks, token_ids, positions, slots, seq_lens, query_start, part_start,
    logit_rows, block_tables, max_sequences, tokens_stride, blocks_stride, num_tokens, num_sequences,
    HEADER_WORDS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sequence (and part of its tokens), and a last one for the padding.

    `num_tokens` and `num_sequences` are the padded ones. A padded sequence has length 0 and no tokens; a padded
    token writes to slot -1, which is nowhere.
    """
    s = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    real_sequences = tl.load(message)
    real_tokens = tl.load(message + 1)
    real_parts = tl.load(message + 2)
    if s == num_sequences:
        tl.store(query_start + s, real_tokens)
        tl.store(part_start + s, real_parts)
        for first in range(real_tokens + part * BLOCK, num_tokens, parts * BLOCK):
            t = first + tl.arange(0, BLOCK)
            is_token = t < num_tokens
            zeros = tl.zeros((BLOCK,), tl.int32)
            tl.store(token_ids + t, zeros, mask=is_token)
            tl.store(positions + t, zeros, mask=is_token)
            tl.store(slots + t, zeros - 1, mask=is_token)
        return
    if s >= real_sequences:
        tl.store(query_start + s, real_tokens)
        tl.store(part_start + s, real_parts)
        tl.store(seq_lens + s, 0)
        tl.store(logit_rows + s, 0)
        return
    entry = message + HEADER_WORDS + s
    row = tl.load(entry).to(tl.int64)
    start = tl.load(entry + max_sequences)
    count = tl.load(entry + 2 * max_sequences)
    packed = tl.load(entry + 3 * max_sequences)
    end = start + count
    table = blocks + row * blocks_stride
    for first in range(part * BLOCK, count, parts * BLOCK):
        i = first + tl.arange(0, BLOCK)
        is_token = i < count
        position = start + i
        token = tl.load(tokens + row * tokens_stride + position, mask=is_token, other=0)
        block = tl.load(table + position // BLOCK_TOKENS, mask=is_token, other=0)
        tl.store(token_ids + packed + i, token, mask=is_token)
        tl.store(positions + packed + i, position, mask=is_token)
        tl.store(slots + packed + i, block * BLOCK_TOKENS + position % BLOCK_TOKENS, mask=is_token)
    if part == 0:
        tl.store(query_start + s, packed)
        tl.store(part_start + s, tl.load(entry + 5 * max_sequences))
        tl.store(seq_lens + s, end)
        tl.store(logit_rows + s, packed + count - 1)
        num_blocks = tl.cdiv(end, BLOCK_TOKENS)
        gathered = block_tables + s.to(tl.int64) * blocks_stride
        for first in range(0, num_blocks, BLOCK):
            i = first + tl.arange(0, BLOCK)
            is_block = i < num_blocks
            tl.store(gathered + i, tl.load(table + i, mask=is_block, other=0), mask=is_block)
