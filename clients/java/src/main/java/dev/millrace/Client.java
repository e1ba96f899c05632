package dev.millrace;

import dev.millrace.compiler.v1.CompilerServiceGrpc;
import dev.millrace.compiler.v1.CompilerServiceGrpc.CompilerServiceBlockingStub;
import dev.millrace.runtime.v1.GenerateStreamRequest;
import dev.millrace.runtime.v1.GetStatusRequest;
import dev.millrace.runtime.v1.GetStatusResponse;
import dev.millrace.runtime.v1.RuntimeServiceGrpc;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.TimeUnit;

/**
 * Both daemons, from one place: builds through a compile daemon, generations through a runtime
 * daemon or a gateway. It connects when it is used; any thread may use it.
 */
public final class Client implements Generator, AutoCloseable {
  private final Daemon compiler;
  private final Daemon runtime;
  private final Duration timeout;
  private final Retries retries;

  private Client(Builder builder) {
    var security =
        new Daemon.Security(builder.apiKey, builder.tlsCa, builder.tlsCert, builder.tlsKey);
    timeout = builder.timeout;
    retries = builder.retries;
    compiler = new Daemon(builder.compiler, security);
    runtime = new Daemon(builder.runtime, security);
  }

  /**
   * A client of a runtime daemon or a gateway, in plaintext.
   *
   * @param runtime {@code host:port}.
   * @return the client, to be closed.
   */
  public static Client connect(String runtime) {
    return builder().runtime(runtime).build();
  }

  /**
   * A client to be set up.
   *
   * @return a builder with the defaults.
   */
  public static Builder builder() {
    return new Builder();
  }

  @Override
  public Stream generate(Prompt prompt, GenerateOptions options) {
    var start = options.startGeneration(prompt);
    return stream(GenerateStreamRequest.newBuilder().setStart(start).build());
  }

  /**
   * Goes on with a generation of a gateway whose reader is gone, such as another process. A stream
   * that loses its connection does so by itself.
   *
   * @param generationId as {@link Stream#generationId} was.
   * @param receivedTokens what its reader had, by sample; only what comes after is streamed.
   * @return the stream, to be closed.
   */
  public Stream resume(String generationId, List<Integer> receivedTokens) {
    return stream(Attempts.resume(generationId, receivedTokens));
  }

  /**
   * Many generations on one call, for callers with many streams.
   *
   * @return the session, to be closed.
   */
  public Session session() {
    return new Session(runtime, retries);
  }

  /**
   * What the runtime daemon serves, its limits and its load.
   *
   * @return the daemon's answer.
   * @throws MillraceException it has none.
   */
  public GetStatusResponse getStatus() {
    for (int attempt = 1; ; attempt++) {
      try {
        return RuntimeServiceGrpc.newBlockingStub(runtime.channel())
            .withDeadlineAfter(timeout.toNanos(), TimeUnit.NANOSECONDS)
            .getStatus(GetStatusRequest.getDefaultInstance());
      } catch (StatusRuntimeException raised) {
        Metadata trailers = raised.getTrailers();
        MillraceException error = runtime.failure(raised.getStatus(), trailers);
        Optional<Duration> delay = retries.delay(error, attempt);
        sleep(delay.orElseThrow(() -> error));
      }
    }
  }

  /**
   * The compile daemon's service as generated, for builds and engines; docs/API.md shows it. It does
   * not try again, and fails with gRPC's own exceptions. {@code
   * CompilerServiceGrpc.newFutureStub(client.compiler().getChannel())} does not block.
   *
   * @return the blocking stub, without a deadline.
   */
  public CompilerServiceBlockingStub compiler() {
    return CompilerServiceGrpc.newBlockingStub(compiler.channel());
  }

  /** Closes the connections; streams that still run fail with {@code CANCELLED}. */
  @Override
  public void close() {
    compiler.close();
    runtime.close();
  }

  private Stream stream(GenerateStreamRequest command) {
    return new Stream(
        (asked, left, listener) -> SingleCall.open(runtime, asked, left, listener),
        command,
        retries);
  }

  private static void sleep(Duration delay) {
    try {
      TimeUnit.NANOSECONDS.sleep(delay.toNanos());
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
      throw Errors.cancelled("The thread that waited to ask again was interrupted.");
    }
  }

  /** Sets a client up. */
  public static final class Builder {
    private String compiler = "127.0.0.1:7601";
    private String runtime = "127.0.0.1:7602";
    private Duration timeout = Duration.ofSeconds(30);
    private Retries retries = Retries.DEFAULT;
    private String apiKey = "";
    private Path tlsCa;
    private Path tlsCert;
    private Path tlsKey;

    private Builder() {}

    /**
     * Where the compile daemon is.
     *
     * @param address {@code host:port}, 127.0.0.1:7601 unless set.
     * @return this.
     */
    public Builder compiler(String address) {
      compiler = address;
      return this;
    }

    /**
     * Where the runtime daemon or the gateway is.
     *
     * @param address {@code host:port}, 127.0.0.1:7602 unless set.
     * @return this.
     */
    public Builder runtime(String address) {
      runtime = address;
      return this;
    }

    /**
     * Limits calls that answer at once; builds and generations take their time.
     *
     * @param timeout of one call, 30 s unless set.
     * @return this.
     */
    public Builder timeout(Duration timeout) {
      this.timeout = timeout;
      return this;
    }

    /**
     * How patient it is.
     *
     * @param retries {@link Retries#DEFAULT} unless set.
     * @return this.
     */
    public Builder retries(Retries retries) {
      this.retries = retries;
      return this;
    }

    /**
     * Who it is, where the daemons ask for a key.
     *
     * @param key {@code mr_...}.
     * @return this.
     */
    public Builder apiKey(String key) {
      apiKey = key;
      return this;
    }

    /**
     * Speaks TLS.
     *
     * @param ca path of the CA that signed the daemons' certificates (PEM).
     * @return this.
     */
    public Builder tlsCa(Path ca) {
      tlsCa = ca;
      return this;
    }

    /**
     * Shows a certificate of its own, where daemons ask for one; with {@link #tlsCa}.
     *
     * @param certificate path of the certificate (PEM).
     * @param key path of its private key (PEM, PKCS #8).
     * @return this.
     */
    public Builder tlsCertificate(Path certificate, Path key) {
      tlsCert = certificate;
      tlsKey = key;
      return this;
    }

    /**
     * The client.
     *
     * @return the client, to be closed.
     * @throws IllegalArgumentException an address or a file cannot be used, or the key would cross a
     *     network in plaintext.
     */
    public Client build() {
      return new Client(this);
    }
  }
}
