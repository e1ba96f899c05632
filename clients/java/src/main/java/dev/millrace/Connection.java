package dev.millrace;

import dev.millrace.runtime.v1.AddCredit;
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
  /** Tokens of a generation that the daemon may send before they are read. */
  private static final int CREDIT_TOKENS = 1024;

  private final Daemon runtime;
  private final ClientCall<GenerateRequest, GenerateResponse> call;
  private final Map<String, SharedCall> running = new HashMap<>();
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
    var shared = new SharedCall(requestId, listener);
    MillraceException failed;
    synchronized (this) {
      failed = failure;
      if (failed == null) {
        running.put(requestId, shared);
        call.sendMessage(named(command, requestId));
      }
    }
    if (failed != null) {
      listener.onEnd(failed);
    }
    return shared;
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
      SharedCall shared = arrived(event);
      if (shared != null) { // late events of a generation that its reader left have none
        shared.listener.onEvents(List.of(event));
      }
    }
    call.request(1);
  }

  @Override
  public void onClose(Status status, Metadata trailers) {
    end(runtime.failure(status, trailers));
  }

  /** Whose the event is, which counts it; null where nobody reads it. */
  private synchronized SharedCall arrived(Event event) {
    SharedCall shared = running.get(event.getRequestId());
    if (shared != null) {
      shared.numArrived += event.getTokens().getTokenIdsCount();
      if (event.hasFinished() || event.hasError()) {
        running.remove(event.getRequestId());
      }
    }
    return shared;
  }

  private void end(MillraceException error) {
    List<SharedCall> left;
    synchronized (this) {
      if (failure == null) {
        failure = error;
      }
      left = List.copyOf(running.values());
      running.clear();
    }
    left.forEach(shared -> shared.listener.onEnd(error));
  }

  private static GenerateRequest named(GenerateStreamRequest command, String requestId) {
    GenerateRequest.Builder request = GenerateRequest.newBuilder();
    if (command.hasResume()) {
      var resume = command.getResume().toBuilder().setRequestId(requestId);
      request.setResume(resume.setCreditTokens(CREDIT_TOKENS));
    } else {
      var start = command.getStart().toBuilder().setRequestId(requestId);
      request.setStart(start.setCreditTokens(CREDIT_TOKENS));
    }
    return request.build();
  }

  /** One generation among others. The call brings all of them: it is credit that each waits for. */
  private final class SharedCall implements Call {
    private final String requestId;
    private final Call.Listener listener;
    private int numArrived; // tokens since the last credit

    SharedCall(String requestId, Call.Listener listener) {
      this.requestId = requestId;
      this.listener = listener;
    }

    /** Its reader has taken what arrived. */
    @Override
    public void request() {
      synchronized (Connection.this) {
        if (numArrived >= CREDIT_TOKENS / 2 && running.containsKey(requestId)) {
          var credit = AddCredit.newBuilder().setRequestId(requestId).setTokens(numArrived);
          call.sendMessage(GenerateRequest.newBuilder().setCredit(credit).build());
          numArrived = 0;
        }
      }
    }

    @Override
    public void cancel() {
      synchronized (Connection.this) {
        if (running.remove(requestId) != null && failure == null) {
          var cancel = CancelGeneration.newBuilder().setRequestId(requestId);
          call.sendMessage(GenerateRequest.newBuilder().setCancel(cancel).build());
        }
      }
    }
  }
}
