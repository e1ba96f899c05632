package dev.millrace;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import dev.millrace.runtime.v1.Event;
import dev.millrace.runtime.v1.GenerateStreamRequest;
import dev.millrace.runtime.v1.GenerationFinished;
import dev.millrace.runtime.v1.TokenChunk;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.Flow;
import org.junit.jupiter.api.Test;

/** What a reader asks of its call, and tells its subscriber, one step at a time. */
class ReaderTest {
  private final ScriptedCall call = new ScriptedCall();
  private final Stream stream =
      new Stream(call, GenerateStreamRequest.getDefaultInstance(), Retries.DEFAULT);
  private final Watcher watcher = new Watcher();

  @Test
  void noMoreThanWasAskedForArrives() {
    stream.subscribe(watcher);
    call.listener.onEvents(List.of(tokens("a"), tokens("b"), tokens("c")));
    assertEquals(List.of(), watcher.seen);
    watcher.subscription.request(2);
    assertEquals(List.of("a", "b"), watcher.seen);
    watcher.subscription.request(Long.MAX_VALUE);
    watcher.subscription.request(Long.MAX_VALUE); // more than any number is as good
    assertEquals(List.of("a", "b", "c"), watcher.seen);
  }

  @Test
  void oneMessageAtMostWaitsForDemand() {
    stream.subscribe(watcher);
    assertEquals(1, call.numRequested);
    call.listener.onEvents(List.of(tokens("a"), tokens("b")));
    watcher.subscription.request(1);
    assertEquals(1, call.numRequested);
    watcher.subscription.request(1);
    assertEquals(2, call.numRequested);
  }

  @Test
  void tokensThatWaitAreNotReceivedYet() {
    stream.subscribe(watcher);
    watcher.subscription.request(1);
    call.listener.onEvents(List.of(tokens("a"), tokens("b")));
    assertEquals(List.of(1), stream.receivedTokens());
  }

  @Test
  void endNeedsNoDemand() {
    stream.subscribe(watcher);
    call.listener.onEvents(List.of(Event.newBuilder().setFinished(finished()).build()));
    assertEquals(List.of("end"), watcher.seen);
    assertEquals(0, stream.result().generatedTokens());
  }

  @Test
  void callIsReadToItsEndButNothingFollowsThatOfTheGeneration() {
    stream.subscribe(watcher);
    watcher.subscription.request(9);
    call.listener.onEvents(List.of(Event.newBuilder().setFinished(finished()).build()));
    call.listener.onEvents(List.of(tokens("late")));
    stream.close();
    assertEquals(3, call.numRequested);
    call.listener.onEnd(Errors.callEnded("x"));
    assertEquals(List.of("end"), watcher.seen);
    assertEquals(0, call.numCancelled);
  }

  @Test
  void cancelledSubscriptionIsSilent() {
    stream.subscribe(watcher);
    watcher.subscription.request(9);
    watcher.subscription.cancel();
    call.listener.onEvents(List.of(tokens("a")));
    call.listener.onEnd(Errors.callEnded("x"));
    assertEquals(List.of(), watcher.seen);
    assertEquals(true, call.numCancelled > 0);
  }

  @Test
  void closedStreamCompletesWithoutResult() {
    stream.subscribe(watcher);
    stream.close();
    stream.close();
    assertEquals(List.of("end"), watcher.seen);
    assertThrows(IllegalStateException.class, stream::result);
  }

  @Test
  void cancelledFutureCancelsTheGeneration() {
    stream.toFuture().cancel(true);
    assertEquals(true, call.numCancelled > 0);
  }

  @Test
  void chunkThatCancelsIsTheLast() {
    watcher.isDoneAfterOne = true;
    stream.subscribe(watcher);
    watcher.subscription.request(9);
    call.listener.onEvents(List.of(tokens("a"), tokens("b")));
    assertEquals(List.of("a"), watcher.seen);
  }

  @Test
  void subscriberThatThrowsCancelsTheGeneration() {
    var failure = Errors.cancelled("of another call"); // not this generation's
    watcher.thrown = failure;
    stream.subscribe(watcher);
    watcher.subscription.request(9);
    List<Throwable> uncaught = new ArrayList<>();
    Thread.currentThread().setUncaughtExceptionHandler((thread, error) -> uncaught.add(error));
    try {
      call.listener.onEvents(List.of(tokens("a"), tokens("b")));
    } finally {
      Thread.currentThread().setUncaughtExceptionHandler(null);
    }
    assertEquals(List.of(failure), uncaught);
    assertEquals(List.of("a", "end"), watcher.seen);
    assertEquals(true, call.numCancelled > 0);
  }

  private static Event tokens(String text) {
    return Event.newBuilder()
        .setTokens(TokenChunk.newBuilder().addTokenIds(1).setText(text))
        .build();
  }

  private static GenerationFinished finished() {
    return GenerationFinished.getDefaultInstance();
  }

  /** A call that notes what is asked of it. */
  private static final class ScriptedCall implements Call, Call.Opener {
    private Listener listener;
    private int numRequested;
    private int numCancelled;

    @Override
    public Call open(GenerateStreamRequest command, Optional<Duration> timeout, Listener listener) {
      this.listener = listener;
      return this;
    }

    @Override
    public void request() {
      numRequested += 1;
    }

    @Override
    public void cancel() {
      numCancelled += 1;
    }
  }

  /** A subscriber that notes what it is told. */
  private static final class Watcher implements Flow.Subscriber<Chunk> {
    private final List<String> seen = new ArrayList<>();
    private Flow.Subscription subscription;
    private boolean isDoneAfterOne;
    private RuntimeException thrown;

    @Override
    public void onSubscribe(Flow.Subscription subscription) {
      this.subscription = subscription;
    }

    @Override
    public void onNext(Chunk chunk) {
      seen.add(chunk.text());
      if (isDoneAfterOne) {
        subscription.cancel();
      }
      if (thrown != null) {
        throw thrown;
      }
    }

    @Override
    public void onError(Throwable error) {
      seen.add(error.getMessage());
    }

    @Override
    public void onComplete() {
      seen.add("end");
    }
  }
}
