package dev.millrace.conformance;

import dev.millrace.Chunk;
import dev.millrace.Client;
import dev.millrace.Stream;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionException;
import java.util.concurrent.Flow;
import java.util.concurrent.TimeUnit;

/** Reads a stream as its action says, a chunk at a time, without a thread that waits for it. */
final class Subscriber implements Flow.Subscriber<Chunk> {
  private final Client client;
  private final Report report;
  private final CompletableFuture<Boolean> hasLeft = new CompletableFuture<>();
  private Flow.Subscription subscription;

  Subscriber(Client client, Stream stream, Report report) {
    this.client = client;
    this.report = report;
    stream.subscribe(this);
  }

  /** Waits for the end; whether the stream was left before its own. */
  boolean hasLeft() {
    try {
      return hasLeft.join();
    } catch (CompletionException failed) {
      throw (RuntimeException) failed.getCause();
    }
  }

  @Override
  public void onSubscribe(Flow.Subscription subscription) {
    this.subscription = subscription;
    subscription.request(1);
  }

  @Override
  public void onNext(Chunk chunk) {
    if (!report.take(chunk)) {
      subscription.cancel();
      hasLeft.complete(true);
    } else if (report.isPause()) {
      CompletableFuture.delayedExecutor(report.pause().toMillis(), TimeUnit.MILLISECONDS)
          .execute(
              () -> {
                client.getStatus();
                subscription.request(1);
              });
    } else {
      subscription.request(1);
    }
  }

  @Override
  public void onError(Throwable error) {
    hasLeft.completeExceptionally(error);
  }

  @Override
  public void onComplete() {
    hasLeft.complete(false);
  }
}
