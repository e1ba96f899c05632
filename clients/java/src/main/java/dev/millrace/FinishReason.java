package dev.millrace;

/** Why a sample ended. */
public enum FinishReason {
  /** An end token of the model, or one that was asked for. */
  STOP_TOKEN,
  /** A string that was asked for. */
  STOP_STRING,
  /** The most tokens that were asked for, or the engine's limit. */
  LENGTH,
  /** Its client cancelled it. */
  CANCELLED,
  /** A reason of a newer server. */
  UNSPECIFIED;

  static FinishReason of(dev.millrace.runtime.v1.FinishReason reason) {
    return switch (reason) {
      case FINISH_REASON_STOP_TOKEN -> STOP_TOKEN;
      case FINISH_REASON_STOP_STRING -> STOP_STRING;
      case FINISH_REASON_LENGTH -> LENGTH;
      case FINISH_REASON_CANCELLED -> CANCELLED;
      case FINISH_REASON_UNSPECIFIED, UNRECOGNIZED -> UNSPECIFIED;
    };
  }
}
