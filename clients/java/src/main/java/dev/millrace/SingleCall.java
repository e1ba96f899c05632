package dev.millrace;

import dev.millrace.runtime.v1.GenerateStreamRequest;
import dev.millrace.runtime.v1.GenerateStreamResponse;
import dev.millrace.runtime.v1.RuntimeServiceGrpc;
import io.grpc.CallOptions;
import io.grpc.ClientCall;
import io.grpc.Metadata;
import io.grpc.Status;
import java.time.Duration;
import java.util.Optional;
import java.util.concurrent.TimeUnit;

/** One generation on a call of its own. A message that is not asked for waits on the way. */
final class SingleCall implements Call {
  private final ClientCall<GenerateStreamRequest, GenerateStreamResponse> call;

  private SingleCall(ClientCall<GenerateStreamRequest, GenerateStreamResponse> call) {
    this.call = call;
  }

  /** A call of the daemon, which has begun; as {@link Call.Opener#open}. */
  static Call open(
      Daemon runtime,
      GenerateStreamRequest command,
      Optional<Duration> timeout,
      Listener listener) {
    CallOptions options =
        timeout
            .map(left -> CallOptions.DEFAULT.withDeadlineAfter(left.toNanos(), TimeUnit.NANOSECONDS))
            .orElse(CallOptions.DEFAULT);
    var call = runtime.newCall(RuntimeServiceGrpc.getGenerateStreamMethod(), options);
    call.start(
        new ClientCall.Listener<>() {
          @Override
          public void onMessage(GenerateStreamResponse response) {
            listener.onEvents(response.getEventsList());
          }

          @Override
          public void onClose(Status status, Metadata trailers) {
            listener.onEnd(runtime.failure(status, trailers));
          }
        },
        new Metadata());
    call.sendMessage(command);
    call.halfClose();
    return new SingleCall(call);
  }

  @Override
  public void request() {
    call.request(1);
  }

  @Override
  public void cancel() {
    call.cancel("the reader left", null);
  }
}
