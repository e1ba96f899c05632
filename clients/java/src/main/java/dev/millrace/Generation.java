package dev.millrace;

import java.time.Duration;
import java.util.List;

/**
 * A finished generation.
 *
 * @param samples its answers, as many as were asked for.
 * @param seed repeats it exactly; 64 bits, unsigned: {@link Long#toUnsignedString(long)}.
 * @param promptTokens tokens of the prompt.
 * @param cachedPromptTokens those of them that were found in the KV cache.
 * @param generatedTokens over all samples.
 * @param queued from the start to the first step that ran it, as the daemon counts.
 * @param timeToFirstToken queueing included.
 * @param total from the start to the end.
 * @param numResumes how often its connection was lost and it went on over another one.
 */
public record Generation(
    List<Sample> samples,
    long seed,
    int promptTokens,
    int cachedPromptTokens,
    int generatedTokens,
    Duration queued,
    Duration timeToFirstToken,
    Duration total,
    int numResumes) {

  /**
   * The first sample's text.
   *
   * @return the text.
   */
  public String text() {
    return samples.isEmpty() ? "" : samples.get(0).text();
  }

  /**
   * Tokens a second after the first token.
   *
   * @return the rate; 0 where there was at most one token.
   */
  public double tokensPerSecond() {
    double decodingS = total.minus(timeToFirstToken).toNanos() / 1e9;
    int rest = generatedTokens - samples.size();
    return rest > 0 && decodingS > 0 ? rest / decodingS : 0;
  }
}
