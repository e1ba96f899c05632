package dev.millrace;

import dev.millrace.runtime.v1.GenerateStreamRequest;

/**
 * Many generations on one call: the daemon sends one message a step for all of them. Any thread may
 * use it.
 *
 * <p>{@link #close} ends what still runs. Where the call breaks, another one takes its place, and
 * each stream goes on there, or fails, by itself. The daemon alone keeps {@link
 * GenerateOptions.Builder#timeout}. A stream that is not read
 * waits, 1,024 tokens or so ahead of its reader, and holds up no other.
 */
public final class Session implements Generator, AutoCloseable {
  private final Daemon runtime;
  private final Retries retries;
  private Connection connection;
  private long lastId;
  private boolean isClosed;

  Session(Daemon runtime, Retries retries) {
    this.runtime = runtime;
    this.retries = retries;
    this.connection = new Connection(runtime);
  }

  @Override
  public Stream generate(Prompt prompt, GenerateOptions options) {
    var start = options.startGeneration(prompt);
    var command = GenerateStreamRequest.newBuilder().setStart(start).build();
    return new Stream((asked, timeout, listener) -> open(asked, listener), command, retries);
  }

  /** Ends the call; streams that still run fail with {@code CANCELLED}. */
  @Override
  public void close() {
    Connection running;
    synchronized (this) {
      isClosed = true;
      running = connection();
    }
    running.close();
  }

  private Call open(GenerateStreamRequest command, Call.Listener listener) {
    Connection running;
    String requestId;
    synchronized (this) {
      running = connection();
      requestId = Long.toString(++lastId);
    }
    return running.open(requestId, command, listener);
  }

  private synchronized Connection connection() {
    if (connection.hasEnded() && !isClosed) {
      connection = new Connection(runtime);
    }
    return connection;
  }
}
