package dev.millrace;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.millrace.runtime.v1.Event;
import dev.millrace.runtime.v1.GenerateStreamRequest;
import dev.millrace.runtime.v1.GenerationStarted;
import io.grpc.Status;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import org.junit.jupiter.api.Test;

/** Times that pass, which the conformance suite does not wait for. */
class AttemptsTest {
  private static final MillraceException LOST =
      Errors.fromCall(Status.UNAVAILABLE, null, "127.0.0.1:1");

  private final Collector collector = new Collector("", List.of());
  private long nanos;

  @Test
  void noCallBeginsAfterTheDeadlineAndNoneIsWaitedForBeyondIt() {
    Attempts attempts = attempts(GenerateOptions.builder().timeout(Duration.ofSeconds(1)).build());
    attempts.open();
    assertEquals(Optional.of(Duration.ofMillis(1500)), attempts.timeout());
    assertTrue(attempts.delay(LOST).orElseThrow().compareTo(Duration.ofMillis(200)) < 0);
    nanos = Duration.ofMillis(1450).toNanos();
    assertEquals(Optional.empty(), attempts.delay(LOST));
    nanos = Duration.ofSeconds(9).toNanos();
    assertEquals(Optional.of(Duration.ZERO), attempts.timeout());
  }

  @Test
  void generationWithoutDeadlineMayTakeItsTime() {
    Attempts attempts = attempts(GenerateOptions.DEFAULT);
    attempts.open();
    assertEquals(Optional.empty(), attempts.timeout());
  }

  @Test
  void lossesThatBringEventsAndNoTokenEnd() {
    Attempts attempts = attempts(GenerateOptions.DEFAULT);
    for (boolean isLast : new boolean[] {false, false, true}) {
      attempts.open();
      var started = GenerationStarted.newBuilder().setGenerationId("x1");
      collector.take(Event.newBuilder().setStarted(started).build());
      assertEquals(isLast, attempts.delay(LOST).isEmpty());
    }
    assertEquals(2, attempts.numResumes());
  }

  @Test
  void delayDoublesAndIsSpread() {
    Retries retries = new Retries(9, Duration.ofMillis(100), Duration.ofSeconds(10));
    for (int attempt = 1; attempt <= 6; attempt++) {
      double leastMs = 100 * Math.pow(2, attempt - 1);
      double ms = retries.delay(LOST, attempt).orElseThrow().toNanos() / 1e6;
      assertTrue(leastMs <= ms && ms <= leastMs * 1.25, attempt + ": " + ms);
    }
  }

  @Test
  void whatRetryingCannotHelpIsNotTriedAgain() {
    var error =
        new MillraceException("no", "PROMPT_TOO_LONG", Status.Code.INVALID_ARGUMENT, Map.of(), null);
    assertEquals(Optional.empty(), Retries.DEFAULT.delay(error, 1));
  }

  private Attempts attempts(GenerateOptions options) {
    var start = options.startGeneration(Prompt.text("hello"));
    var command = GenerateStreamRequest.newBuilder().setStart(start).build();
    return new Attempts(command, collector, Retries.DEFAULT.withMaxAttempts(3), () -> nanos);
  }
}
