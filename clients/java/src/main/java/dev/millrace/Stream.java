package dev.millrace;

import dev.millrace.runtime.v1.GenerateStreamRequest;
import java.util.Iterator;
import java.util.List;
import java.util.Objects;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Flow;

/**
 * One generation, read once: by iterating it, or by a subscriber whose demand holds the server back.
 * {@link #close} cancels what still runs.
 *
 * <pre>{@code
 * try (Stream stream = client.generate("Once upon a time")) {
 *   for (Chunk chunk : stream) System.out.print(chunk.text());
 * }
 * }</pre>
 *
 * <p>A start that the daemon refuses with a retry delay is tried again as long as nothing arrived. A
 * connection to a gateway that is lost later is made anew, and the generation goes on where it was.
 */
public final class Stream implements Iterable<Chunk>, Flow.Publisher<Chunk>, AutoCloseable {
  private final Collector collector;
  private final Attempts attempts;
  private final Reader reader;
  private ChunkIterator iterator;
  private boolean hasReader;

  Stream(Call.Opener calls, GenerateStreamRequest command, Retries retries) {
    var resume = command.getResume();
    collector = new Collector(resume.getGenerationId(), resume.getReceivedTokensList());
    attempts = new Attempts(command, collector, retries, System::nanoTime);
    reader = new Reader(calls, collector, attempts);
  }

  /**
   * The chunks as they arrive, for one thread at a time; always the same iterator. It throws {@link
   * MillraceException} where the generation fails, or the thread is interrupted, and ends where
   * another thread closes the stream.
   *
   * @throws IllegalStateException the stream has a subscriber.
   */
  @Override
  public synchronized Iterator<Chunk> iterator() {
    if (iterator == null) {
      if (!isFirstReader()) {
        throw new IllegalStateException("the stream has a subscriber, and is read once");
      }
      iterator = new ChunkIterator(this);
      reader.start(iterator);
    }
    return iterator;
  }

  /**
   * The chunks as they arrive, on gRPC's threads, as many as are asked for; a stream that is closed
   * completes. The error is a {@link MillraceException}; to a second reader, an {@link
   * IllegalStateException}.
   */
  @Override
  public void subscribe(Flow.Subscriber<? super Chunk> subscriber) {
    Objects.requireNonNull(subscriber);
    if (isFirstReader()) {
      reader.start(subscriber);
      return;
    }
    subscriber.onSubscribe(
        new Flow.Subscription() {
          @Override
          public void request(long n) {}

          @Override
          public void cancel() {}
        });
    subscriber.onError(new IllegalStateException("the stream has a reader, and is read once"));
  }

  /**
   * Reads what is left.
   *
   * @return the finished generation.
   * @throws MillraceException it failed.
   */
  public Generation await() {
    iterator().forEachRemaining(chunk -> {});
    return result();
  }

  /**
   * Reads all of it, on gRPC's threads. Cancelling the future cancels the generation.
   *
   * @return the finished generation, or a {@link MillraceException}; cancelled where the stream was
   *     closed.
   */
  public CompletableFuture<Generation> toFuture() {
    CompletableFuture<Generation> future = new CompletableFuture<>();
    future.whenComplete((generation, error) -> close());
    subscribe(
        new Flow.Subscriber<>() {
          @Override
          public void onSubscribe(Flow.Subscription subscription) {
            subscription.request(Long.MAX_VALUE);
          }

          @Override
          public void onNext(Chunk chunk) {}

          @Override
          public void onError(Throwable error) {
            future.completeExceptionally(error);
          }

          @Override
          public void onComplete() {
            collector
                .result(numResumes())
                .ifPresentOrElse(
                    future::complete,
                    () -> future.completeExceptionally(new CancellationException()));
          }
        });
    return future;
  }

  /** Cancels what still runs; does nothing to a stream that has ended. Any thread may call it. */
  @Override
  public void close() {
    reader.close();
  }

  /**
   * Names the generation for {@link Client#resume}.
   *
   * @return its id; "" before it has started, and where it cannot be resumed.
   */
  public String generationId() {
    return collector.generationId();
  }

  /**
   * Counts the tokens that have arrived, for {@link Client#resume}.
   *
   * @return how many, by sample.
   */
  public List<Integer> receivedTokens() {
    return collector.receivedTokens();
  }

  /**
   * How often its connection was lost and it went on over another one.
   *
   * @return how often.
   */
  public int numResumes() {
    return attempts.numResumes();
  }

  /**
   * The finished generation.
   *
   * @return all that came of it.
   * @throws IllegalStateException the stream was not read to its end.
   */
  public Generation result() {
    String message = "the generation has not finished: read the stream to its end first";
    return collector.result(numResumes()).orElseThrow(() -> new IllegalStateException(message));
  }

  private synchronized boolean isFirstReader() {
    boolean isFirst = !hasReader;
    hasReader = true;
    return isFirst;
  }
}
