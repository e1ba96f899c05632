package dev.millrace;

import dev.millrace.runtime.v1.GenerateStreamRequest;
import dev.millrace.runtime.v1.ResumeGeneration;
import java.time.Duration;
import java.util.List;
import java.util.Optional;
import java.util.function.LongSupplier;

/**
 * The calls that one generation takes: its start, and what follows where one fails.
 *
 * <p>A start of which nothing arrived is sent again, where that can help. Later on the generation is
 * resumed, by the id that the server gave it and the tokens that have arrived, so that no token is
 * lost and none comes twice. Both end after {@link Retries#maxAttempts} calls in a row without a
 * token.
 */
final class Attempts {
  // A daemon ends a generation at its deadline and says so; who hears nothing waits this much longer.
  private static final Duration DEADLINE_GRACE = Duration.ofMillis(500);

  private final GenerateStreamRequest command;
  private final Collector collector;
  private final Retries retries;
  private final LongSupplier nanoTime;
  private long startNanos;
  private Duration limit;
  private int numFruitless;
  // As they were when the running call was opened.
  private int numTokens;
  private int numEvents;
  private volatile int numResumes;

  /** A start's deadline counts from its first call, by {@code nanoTime}. */
  Attempts(
      GenerateStreamRequest command, Collector collector, Retries retries, LongSupplier nanoTime) {
    this.command = command;
    this.collector = collector;
    this.retries = retries;
    this.nanoTime = nanoTime;
  }

  /** The request of the call that is opened now. */
  GenerateStreamRequest open() {
    if (limit == null && command.getStart().hasTimeout()) {
      var timeout = command.getStart().getTimeout();
      limit = Duration.ofSeconds(timeout.getSeconds(), timeout.getNanos()).plus(DEADLINE_GRACE);
      startNanos = nanoTime.getAsLong();
    }
    numTokens = sum(collector.receivedTokens());
    numEvents = collector.numEvents();
    if (numEvents == 0) {
      return command;
    }
    numResumes += 1;
    return resume(collector.generationId(), collector.receivedTokens());
  }

  /** What is left for the call that is opened now; empty: it may take its time. */
  Optional<Duration> timeout() {
    if (limit == null) {
      return Optional.empty();
    }
    Duration left = limit.minusNanos(nanoTime.getAsLong() - startNanos);
    return Optional.of(left.isNegative() ? Duration.ZERO : left);
  }

  /** How long to wait before the next call, now that one has failed; empty: there is none. */
  Optional<Duration> delay(MillraceException error) {
    if (sum(collector.receivedTokens()) > numTokens) {
      numFruitless = 0;
    }
    numFruitless += 1;
    if (collector.numEvents() > numEvents && !Errors.isLostCall(error)) {
      return Optional.empty(); // it is the generation that failed, not its call
    }
    if (collector.numEvents() > 0 && collector.generationId().isEmpty()) {
      return Optional.empty();
    }
    Optional<Duration> left = timeout();
    return retries
        .delay(error, numFruitless)
        .filter(delay -> left.isEmpty() || delay.compareTo(left.get()) < 0);
  }

  /** How often its connection was lost and it went on over another one. */
  int numResumes() {
    return numResumes;
  }

  /** The request that goes on with a generation after so many tokens of each sample. */
  static GenerateStreamRequest resume(String generationId, List<Integer> receivedTokens) {
    ResumeGeneration.Builder resume = ResumeGeneration.newBuilder().setGenerationId(generationId);
    resume.addAllReceivedTokens(receivedTokens);
    return GenerateStreamRequest.newBuilder().setResume(resume).build();
  }

  private static int sum(List<Integer> numbers) {
    return numbers.stream().mapToInt(Integer::intValue).sum();
  }
}
