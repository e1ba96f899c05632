package dev.millrace;

import static org.junit.jupiter.api.Assertions.assertEquals;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.rpc.ErrorInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import java.io.IOException;
import org.junit.jupiter.api.Test;

/** What a broken server or proxy may say; the conformance suite's is in order. */
class ErrorsTest {
  private static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

  @Test
  void detailsOfAnotherStatusAreLeftOut() {
    var other = com.google.rpc.Status.newBuilder().setCode(3).setMessage("of another").build();
    var error = failure(Status.NOT_FOUND.withDescription("gone"), other.toByteArray());
    assertEquals("NOT_FOUND gone", error.reason() + " " + error.getMessage());
  }

  @Test
  void detailsThatCannotBeReadAreLeftOut() {
    var error = failure(Status.NOT_FOUND.withDescription("gone"), new byte[] {7, 7, 7});
    assertEquals("NOT_FOUND gone", error.reason() + " " + error.getMessage());
  }

  @Test
  void infoThatCannotBeReadLeavesTheStatus() {
    Any info = Any.pack(ErrorInfo.getDefaultInstance());
    Any broken = info.toBuilder().setValue(ByteString.copyFrom(new byte[] {7, 7, 7})).build();
    var status = com.google.rpc.Status.newBuilder().setCode(5).setMessage("gone");
    var error = failure(Status.NOT_FOUND, status.addDetails(broken).build().toByteArray());
    assertEquals("NOT_FOUND gone", error.reason() + " " + error.getMessage());
  }

  @Test
  void causeOfAnUnreachableDaemonIsTold() {
    Status status =
        Status.UNAVAILABLE.withDescription("io exception").withCause(new IOException("refused"));
    var error = Errors.fromCall(status, new Metadata(), "x:1");
    assertEquals("No daemon answers at x:1: refused", error.getMessage());
    assertEquals("refused", error.metadata().get("details"));
  }

  private static MillraceException failure(Status status, byte[] details) {
    Metadata trailers = new Metadata();
    trailers.put(DETAILS, details);
    return Errors.fromCall(status, trailers, "x:1");
  }
}
