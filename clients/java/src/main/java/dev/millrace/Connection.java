package dev.millrace;

import dev.millrace.runtime.v1.CancelGeneration;
import dev.millrace.runtime.v1.Event;
import dev.millrace.runtime.v1.GenerateRequest;
import dev.millrace.runtime.v1.GenerateResponse;
import dev.millrace.runtime.v1.GenerateStreamRequest;
import dev.millrace.runtime.v1.RuntimeServiceGrpc;
import io.grpc.CallOptions;
import io.grpc.ClientCall;
import io.grpc.Metadata;
import io.grpc.Status;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/** A session's call, and who reads what of it; where it has broken it is of no more use. */
final class Connection extends ClientCall.Listener<GenerateResponse> {
  private final Daemon runtime;
  private final ClientCall<GenerateRequest, GenerateResponse> call;
  private final Map<String, Call.Listener> listeners = new HashMap<>();
  private MillraceException failure;

  Connection(Daemon runtime) {
    this.runtime = runtime;
    this.call = runtime.newCall(RuntimeServiceGrpc.getGenerateMethod(), CallOptions.DEFAULT);
    call.start(this, new Metadata());
    call.request(1);
  }

  /** Whether it takes no more generations. */
  synchronized boolean hasEnded() {
    return failure != null;
  }

  /** One generation among the others, by an id that none of them had. */
  Call open(String requestId, GenerateStreamRequest command, Call.Listener listener) {
    MillraceException failed;
    synchronized (this) {
      failed = failure;
      if (failed == null) {
        listeners.put(requestId, listener);
        call.sendMessage(named(command, requestId));
      }
    }
    if (failed != null) {
      listener.onEnd(failed);
    }
    return new Call() {
      @Override
      public void request() {} // all that the call brings is taken: others must not wait for one

      @Override
      public void cancel() {
        leave(requestId);
      }
    };
  }

  /** Ends the call, and with it what runs on it. */
  void close() {
    MillraceException closed = Errors.cancelled("The session was closed.");
    synchronized (this) {
      failure = closed; // whatever it had failed with before
    }
    end(closed);
    call.cancel("the session was closed", null);
  }

  @Override
  public void onMessage(GenerateResponse response) {
    for (Event event : response.getEventsList()) {
      Call.Listener listener = listener(event);
      if (listener != null) { // late events of a generation that its reader left have none
        listener.onEvents(List.of(event));
      }
    }
    call.request(1);
  }

  @Override
  public void onClose(Status status, Metadata trailers) {
    end(runtime.failure(status, trailers));
  }

  private synchronized Call.Listener listener(Event event) {
    boolean isTerminal = event.hasFinished() || event.hasError();
    String requestId = event.getRequestId();
    return isTerminal ? listeners.remove(requestId) : listeners.get(requestId);
  }

  private synchronized void leave(String requestId) {
    if (listeners.remove(requestId) != null && failure == null) {
      var cancel = CancelGeneration.newBuilder().setRequestId(requestId);
      call.sendMessage(GenerateRequest.newBuilder().setCancel(cancel).build());
    }
  }

  private void end(MillraceException error) {
    List<Call.Listener> left;
    synchronized (this) {
      if (failure == null) {
        failure = error;
      }
      left = List.copyOf(listeners.values());
      listeners.clear();
    }
    left.forEach(listener -> listener.onEnd(error));
  }

  private static GenerateRequest named(GenerateStreamRequest command, String requestId) {
    GenerateRequest.Builder request = GenerateRequest.newBuilder();
    if (command.hasResume()) {
      request.setResume(command.getResume().toBuilder().setRequestId(requestId));
    } else {
      request.setStart(command.getStart().toBuilder().setRequestId(requestId));
    }
    return request.build();
  }
}
