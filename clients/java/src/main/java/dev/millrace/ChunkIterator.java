package dev.millrace;

import java.util.Iterator;
import java.util.NoSuchElementException;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.Flow;
import java.util.concurrent.LinkedBlockingQueue;

/** Reads a stream one chunk at a time; whoever iterates waits for it. */
final class ChunkIterator implements Iterator<Chunk>, Flow.Subscriber<Chunk> {
  private final Stream stream;
  private final BlockingQueue<News> news = new LinkedBlockingQueue<>();
  private Flow.Subscription subscription;
  private News next;

  /** What arrived: a chunk, an error, or with neither of them the end. */
  private record News(Chunk chunk, MillraceException error) {}

  ChunkIterator(Stream stream) {
    this.stream = stream;
  }

  @Override
  public boolean hasNext() {
    if (next == null) {
      subscription.request(1);
      next = await();
    }
    if (next.error != null) {
      next.error.fillInStackTrace(); // it happened on another thread, which tells the caller nothing
      throw next.error;
    }
    return next.chunk != null;
  }

  @Override
  public Chunk next() {
    if (!hasNext()) {
      throw new NoSuchElementException("the stream has ended");
    }
    Chunk chunk = next.chunk;
    next = null;
    return chunk;
  }

  @Override
  public void onSubscribe(Flow.Subscription subscription) {
    this.subscription = subscription;
  }

  @Override
  public void onNext(Chunk chunk) {
    news.add(new News(chunk, null));
  }

  @Override
  public void onError(Throwable error) {
    news.add(new News(null, (MillraceException) error));
  }

  @Override
  public void onComplete() {
    news.add(new News(null, null));
  }

  private News await() {
    try {
      return news.take();
    } catch (InterruptedException interrupted) {
      stream.close();
      Thread.currentThread().interrupt();
      return new News(null, Errors.cancelled("The thread that read the stream was interrupted."));
    }
  }
}
