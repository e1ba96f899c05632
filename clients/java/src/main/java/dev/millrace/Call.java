package dev.millrace;

import dev.millrace.runtime.v1.Event;
import dev.millrace.runtime.v1.GenerateStreamRequest;
import java.time.Duration;
import java.util.List;
import java.util.Optional;

/** What runs a generation: a call of its own, or its part of a shared one. Any thread may use it. */
interface Call {
  /** Asks for more events: those that came were taken. */
  void request();

  /** Ends the generation. */
  void cancel();

  /** Who reads a call; told one thing at a time. */
  interface Listener {
    /** Takes events as they arrived. */
    void onEvents(List<Event> events);

    /** Takes what the call ended with; {@code CALL_ENDED} where the server saw nothing wrong. */
    void onEnd(MillraceException error);
  }

  /** Sends a first request, and takes at most {@code timeout} if there is one. */
  interface Opener {
    /** The call, which has begun. */
    Call open(GenerateStreamRequest command, Optional<Duration> timeout, Listener listener);
  }
}
