package dev.millrace;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.Map;

/**
 * What calls and generations fail with, as exceptions: a google.rpc.Status with an ErrorInfo of the
 * domain {@code millrace} and RetryInfo where trying again can help, or what became of a connection.
 */
final class Errors {
  static final String UNREACHABLE = "UNREACHABLE";
  private static final String CALL_ENDED = "CALL_ENDED";

  private Errors() {}

  /** The exception that a status says. */
  static MillraceException fromStatus(com.google.rpc.Status status) {
    Status.Code code = Status.fromCodeValue(status.getCode()).getCode();
    String reason = code.name();
    Map<String, String> metadata = Map.of();
    Duration retryAfter = null;
    try {
      for (Any detail : status.getDetailsList()) {
        if (detail.is(ErrorInfo.class)) {
          ErrorInfo info = detail.unpack(ErrorInfo.class);
          reason = info.getReason();
          metadata = info.getMetadataMap();
        } else if (detail.is(RetryInfo.class)) {
          var delay = detail.unpack(RetryInfo.class).getRetryDelay();
          retryAfter = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
        }
      }
    } catch (InvalidProtocolBufferException broken) {
      // What could be read stands: the code and its sentence tell the failure without details.
      retryAfter = null;
    }
    return new MillraceException(status.getMessage(), reason, code, metadata, retryAfter);
  }

  /** The exception that a call of the daemon at {@code address} ended with. */
  static MillraceException fromCall(Status status, Metadata trailers, String address) {
    Status.Code code = status.getCode();
    com.google.rpc.Status told = told(status, trailers);
    if (told.getDetailsCount() > 0) {
      return fromStatus(told);
    }
    if (code == Status.Code.UNAVAILABLE) {
      // Also a proxy's, which comes without details.
      String details = causes(status);
      Map<String, String> metadata = Map.of("address", address, "details", details);
      String message = "No daemon answers at " + address + ": " + details;
      return new MillraceException(message, UNREACHABLE, code, metadata, null);
    }
    String message = status.getDescription() == null ? code.name() : status.getDescription();
    if (code == Status.Code.DEADLINE_EXCEEDED) {
      message = "The daemon at " + address + " did not answer in time.";
    }
    return new MillraceException(message, code.name(), code, Map.of("address", address), null);
  }

  /** The exception of a daemon that ended a call before its generations had ended. */
  static MillraceException callEnded(String address) {
    String message = "The daemon at " + address + " ended the call.";
    return new MillraceException(
        message, CALL_ENDED, Status.Code.UNAVAILABLE, Map.of("address", address), null);
  }

  /** The exception of who was still reading when the reader's side ended it. */
  static MillraceException cancelled(String message) {
    Status.Code code = Status.Code.CANCELLED;
    return new MillraceException(message, code.name(), code, Map.of(), null);
  }

  /** Claims that a call broke, and that its generations may go on elsewhere. */
  static boolean isLostCall(MillraceException error) {
    return error.reason().equals(UNREACHABLE) || error.reason().equals(CALL_ENDED);
  }

  private static com.google.rpc.Status told(Status status, Metadata trailers) {
    try {
      return StatusProto.fromStatusAndTrailers(status, trailers);
    } catch (IllegalArgumentException broken) {
      // Details that cannot be read, or are another status's: what gRPC itself says stands.
      return StatusProto.fromStatusAndTrailers(status, null);
    }
  }

  /** gRPC's words, and those of the failure below them: "io exception" alone tells nobody anything. */
  private static String causes(Status status) {
    String said = status.getDescription() == null ? "unavailable" : status.getDescription();
    Throwable cause = status.getCause();
    if (cause == null) {
      return said.lines().findFirst().orElse(said);
    }
    while (cause.getCause() != null) {
      cause = cause.getCause();
    }
    String hint = "it ends connections; it may ask for TLS, or for a client's certificate";
    return cause.getMessage() == null ? hint : cause.getMessage();
  }
}
