package dev.millrace;

import dev.millrace.runtime.v1.TokenLogprob;
import java.util.List;

/**
 * New tokens of one sample.
 *
 * @param text what they add to the text; may be empty while a character is unfinished.
 * @param tokenIds ids in the engine's vocabulary.
 * @param sampleIndex which of the samples.
 * @param logprobs one per token, when asked for.
 * @param promptLogprobs one per prompt token after the first, when asked for; first chunks only.
 */
public record Chunk(
    String text,
    List<Integer> tokenIds,
    int sampleIndex,
    List<TokenLogprob> logprobs,
    List<TokenLogprob> promptLogprobs) {}
