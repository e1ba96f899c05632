package dev.millrace;

import java.util.List;
import java.util.OptionalInt;

/**
 * One whole answer, and what ended it.
 *
 * @param text all of its text.
 * @param tokenIds all of its tokens.
 * @param finishReason why it ended.
 * @param stopString that ended it; "" where none did.
 * @param stopTokenId that ended it; empty where none did.
 */
public record Sample(
    String text,
    List<Integer> tokenIds,
    FinishReason finishReason,
    String stopString,
    OptionalInt stopTokenId) {}
