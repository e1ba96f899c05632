package dev.millrace;

import io.grpc.Status;
import java.time.Duration;
import java.util.Map;
import java.util.Optional;

/**
 * A call or a generation failed. The message is one sentence for people.
 *
 * @serial exclude
 */
public final class MillraceException extends RuntimeException {
  private static final long serialVersionUID = 1L;

  private final String reason;
  private final Status.Code code;

  @SuppressWarnings("serial") // what Map.copyOf gives is serializable
  private final Map<String, String> metadata;

  private final Duration retryAfter;

  MillraceException(
      String message,
      String reason,
      Status.Code code,
      Map<String, String> metadata,
      Duration retryAfter) {
    super(message);
    this.reason = reason;
    this.code = code;
    this.metadata = Map.copyOf(metadata);
    this.retryAfter = retryAfter;
  }

  /**
   * For programs, such as {@code PROMPT_TOO_LONG}; docs/API.md lists them. {@code UNREACHABLE}
   * where no daemon answered or the connection was lost, and the name of the code where a status
   * carried no reason.
   *
   * @return the reason.
   */
  public String reason() {
    return reason;
  }

  /**
   * The gRPC status code.
   *
   * @return the code.
   */
  public Status.Code code() {
    return code;
  }

  /**
   * The values that the message speaks of.
   *
   * @return them by name; never changes.
   */
  public Map<String, String> metadata() {
    return metadata;
  }

  /**
   * Present where trying again can help: wait this long first.
   *
   * @return the daemon's delay.
   */
  public Optional<Duration> retryAfter() {
    return Optional.ofNullable(retryAfter);
  }
}
