package dev.millrace;

import java.time.Duration;
import java.util.Optional;
import java.util.concurrent.ThreadLocalRandom;

/**
 * How patient a client is with calls that are safe to send twice: reads, and those of a generation.
 *
 * @param maxAttempts calls in all, at least 1, which never tries again.
 * @param firstDelay doubles with each attempt, where the daemon does not name a delay.
 * @param maxDelay a daemon that asks for a longer wait is not waited for.
 */
public record Retries(int maxAttempts, Duration firstDelay, Duration maxDelay) {
  /** Four calls, first after 100 ms, and no wait over 30 s. */
  public static final Retries DEFAULT =
      new Retries(4, Duration.ofMillis(100), Duration.ofSeconds(30));

  /** One call. */
  public static final Retries NONE = DEFAULT.withMaxAttempts(1);

  /**
   * Checks its values.
   *
   * @param maxAttempts as above.
   * @param firstDelay as above.
   * @param maxDelay as above.
   * @throws IllegalArgumentException fewer than one attempt.
   */
  public Retries {
    if (maxAttempts < 1) {
      throw new IllegalArgumentException("maxAttempts is " + maxAttempts + "; at least 1 is needed");
    }
  }

  /**
   * The same patience, with another number of calls.
   *
   * @param maxAttempts calls in all, at least 1.
   * @return the changed copy.
   */
  public Retries withMaxAttempts(int maxAttempts) {
    return new Retries(maxAttempts, firstDelay, maxDelay);
  }

  /** How long to wait before another try, now that {@code attempt} calls were made; empty: none. */
  Optional<Duration> delay(MillraceException error, int attempt) {
    if (attempt >= maxAttempts) {
      return Optional.empty();
    }
    Optional<Duration> asked = error.retryAfter();
    if (asked.isEmpty() && Errors.isLostCall(error)) {
      asked = Optional.of(firstDelay.multipliedBy(1L << Math.min(attempt - 1, 20)));
    }
    // Spread out, so that refused clients do not come back all at once.
    double spread = 1 + ThreadLocalRandom.current().nextDouble() / 4;
    return asked
        .filter(delay -> delay.compareTo(maxDelay) <= 0)
        .map(delay -> Duration.ofNanos((long) (delay.toNanos() * spread)));
  }
}
