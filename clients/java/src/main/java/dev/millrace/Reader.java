package dev.millrace;

import dev.millrace.runtime.v1.Event;
import dev.millrace.runtime.v1.GenerateStreamRequest;
import io.grpc.SynchronizationContext;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.List;
import java.util.Optional;
import java.util.Queue;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Flow;
import java.util.concurrent.TimeUnit;

/**
 * Reads one generation for one subscriber, over as many calls as it takes.
 *
 * <p>Whatever happens, on any thread, happens here one thing after the other: {@code turns} runs it
 * at once, or after what runs now. A message is asked for when the one before was taken, so that at
 * most one waits for demand.
 */
final class Reader implements Flow.Subscription {
  private final SynchronizationContext turns =
      new SynchronizationContext(
          (thread, error) -> {
            close(); // a subscriber that throws has broken the rules, and gets nothing more
            thread.getUncaughtExceptionHandler().uncaughtException(thread, error);
          });
  private final Call.Opener calls;
  private final Collector collector;
  private final Attempts attempts;
  private final Queue<Event> events = new ArrayDeque<>(); // of the messages that were taken
  private Flow.Subscriber<? super Chunk> subscriber;
  private long demand;
  private boolean isMessageAsked;
  private MillraceException callEnd;
  private Listening listening;
  private boolean hasEnded;
  private volatile Call call;
  private volatile boolean isClosed;
  private volatile boolean isCancelled;

  Reader(Call.Opener calls, Collector collector, Attempts attempts) {
    this.calls = calls;
    this.collector = collector;
    this.attempts = attempts;
  }

  /** Begins to read; there is one subscriber. */
  void start(Flow.Subscriber<? super Chunk> subscriber) {
    turns.execute(
        () -> {
          this.subscriber = subscriber;
          subscriber.onSubscribe(this);
          open();
        });
  }

  /** Cancels what still runs; the subscriber's reading ends. */
  void close() {
    isClosed = true;
    // At once, even while the subscriber takes its time with a chunk.
    Call running = call;
    if (running != null && !collector.hasFinished()) {
      running.cancel();
    }
    turns.execute(this::advance);
  }

  @Override
  public void request(long n) {
    turns.execute(
        () -> {
          if (n <= 0 && !hasEnded) {
            fail(new IllegalArgumentException("request(" + n + "): ask for at least one chunk"));
            close();
          } else if (n > 0) {
            demand = demand + n < 0 ? Long.MAX_VALUE : demand + n;
            advance();
          }
        });
  }

  @Override
  public void cancel() {
    isCancelled = true;
    close();
  }

  private void open() {
    if (!isClosed) {
      callEnd = null;
      isMessageAsked = false;
      GenerateStreamRequest command = attempts.open();
      listening = new Listening();
      call = calls.open(command, attempts.timeout(), listening);
    }
    advance();
  }

  /** Takes what has arrived, as far as it is wanted, and asks for more. */
  private void advance() {
    while (!hasEnded && !isClosed && !events.isEmpty()) {
      if (events.peek().hasTokens() && demand == 0) {
        return;
      }
      take(events.remove());
    }
    if (isClosed && !collector.hasFinished()) {
      stop();
    } else if (callEnd != null) {
      if (!hasEnded) {
        retry(callEnd);
      }
    } else if (call != null && !isMessageAsked) {
      // After the generation's end as well, until the server ends its call.
      isMessageAsked = true;
      call.request();
    }
  }

  private void take(Event event) {
    Optional<Chunk> chunk;
    try {
      chunk = collector.take(event);
    } catch (MillraceException failed) {
      retry(failed);
      return;
    }
    if (chunk.isPresent()) {
      demand -= 1;
      subscriber.onNext(chunk.get());
    } else if (collector.hasFinished()) {
      hasEnded = true;
      events.clear();
      subscriber.onComplete();
    }
  }

  private void retry(MillraceException error) {
    leaveCall();
    Optional<Duration> delay = attempts.delay(error);
    if (delay.isEmpty()) {
      fail(error);
      return;
    }
    CompletableFuture.delayedExecutor(delay.get().toNanos(), TimeUnit.NANOSECONDS)
        .execute(() -> turns.execute(this::open));
  }

  private void fail(Throwable error) {
    hasEnded = true;
    subscriber.onError(error);
  }

  /** Does what {@code close} asked for. */
  private void stop() {
    leaveCall();
    if (!hasEnded && subscriber != null) {
      hasEnded = true;
      if (!isCancelled) {
        subscriber.onComplete();
      }
    }
  }

  private void leaveCall() {
    events.clear();
    callEnd = null;
    listening = null;
    if (call != null) {
      call.cancel();
      call = null;
    }
  }

  /** Hears one call, until the reader has left it. */
  private final class Listening implements Call.Listener {
    @Override
    public void onEvents(List<Event> arrived) {
      hear(
          () -> {
            if (!hasEnded) {
              events.addAll(arrived);
            }
            isMessageAsked = false;
          });
    }

    @Override
    public void onEnd(MillraceException error) {
      hear(() -> callEnd = error);
    }

    private void hear(Runnable news) {
      turns.execute(
          () -> {
            if (listening == this) {
              news.run();
              advance();
            }
          });
    }
  }
}
