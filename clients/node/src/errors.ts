// What a call can raise: one error, with everything that the daemon said.

import { Code, ConnectError } from "@connectrpc/connect";
import { fromBinary } from "@bufbuild/protobuf";

import { ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import type { Status } from "./gen/google/rpc/status_pb.js";

/** No daemon answered, or the connection was lost. */
export const UNREACHABLE = "UNREACHABLE";
const CALL_ENDED = "CALL_ENDED";

/** A call, a build or a generation failed. */
export class MillraceError extends Error {
  override readonly name = "MillraceError";

  /**
   * @param message one sentence for people.
   * @param reason for programs, such as `PROMPT_TOO_LONG`; docs/API.md lists them. The name of the
   *   code where a status carried no reason.
   * @param code name of the gRPC status code, such as `INVALID_ARGUMENT`.
   * @param metadata the values that the message speaks of.
   * @param retryAfterS set where trying again can help: wait this long first.
   */
  constructor(
    message: string,
    readonly reason: string,
    readonly code: string,
    readonly metadata: Readonly<Record<string, string>> = {},
    readonly retryAfterS?: number,
  ) {
    super(message);
  }
}

/** The error that a google.rpc.Status says. */
export function fromStatus(status: Status): MillraceError {
  const details = status.details.map((any) => ({
    type: any.typeUrl.slice(any.typeUrl.lastIndexOf("/") + 1),
    value: any.value,
  }));
  return fromDetails(status.message, status.code, details);
}

/**
 * The error that a call of the daemon at `address` ended with. Connect's errors are of two kinds:
 * what the server said has its `grpc-status`; all else is what became of the connection.
 */
export function fromCallError(raised: unknown, address: string): MillraceError {
  if (raised instanceof MillraceError) return raised;
  const error = ConnectError.from(raised);
  const isSaid = error.metadata.has("grpc-status");
  // A proxy's UNAVAILABLE has no details, and is a lost connection as well.
  if (isSaid && (error.code !== Code.Unavailable || error.details.length > 0)) {
    return fromDetails(error.rawMessage, error.code, incoming(error));
  }
  if (error.code === Code.DeadlineExceeded) {
    const message = `The daemon at ${address} did not answer in time.`;
    return new MillraceError(message, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", { address });
  }
  const metadata = { address, details: error.rawMessage };
  const message = `No daemon answers at ${address}: ${error.rawMessage}`;
  return new MillraceError(message, UNREACHABLE, "UNAVAILABLE", metadata);
}

/** The error of a daemon that ended a call before its generations had ended. */
export function callEnded(address: string): MillraceError {
  return new MillraceError(`The daemon at ${address} ended the call.`, CALL_ENDED, "UNAVAILABLE");
}

/** The error of who still reads when its own side ends that: `what` is the client or a session. */
export function closed(what: string): MillraceError {
  return new MillraceError(`The ${what} was closed.`, "CANCELLED", "CANCELLED");
}

/** Claims that a call broke, and that its generations may go on elsewhere. */
export function isLostCall(error: MillraceError): boolean {
  return error.reason === UNREACHABLE || error.reason === CALL_ENDED;
}

type Detail = { type: string; value: Uint8Array };

function incoming(error: ConnectError): Detail[] {
  return error.details.filter((detail): detail is Detail & { debug?: never } => "type" in detail);
}

function fromDetails(message: string, code: number, details: Detail[]): MillraceError {
  let reason = codeName(code);
  let metadata: Record<string, string> = {};
  let retryAfterS: number | undefined;
  for (const { type, value } of details) {
    if (type === ErrorInfoSchema.typeName) {
      ({ reason, metadata } = fromBinary(ErrorInfoSchema, value));
    } else if (type === RetryInfoSchema.typeName) {
      const delay = fromBinary(RetryInfoSchema, value).retryDelay;
      if (delay) retryAfterS = Number(delay.seconds) + delay.nanos / 1e9;
    }
  }
  return new MillraceError(message, reason, codeName(code), metadata, retryAfterS);
}

/** `Code.InvalidArgument` as gRPC writes it: `INVALID_ARGUMENT`. */
function codeName(code: number): string {
  if (code === Code.Canceled) return "CANCELLED";
  const name = Code[code] ?? "Unknown";
  return name.replace(/(?<=[a-z])(?=[A-Z])/g, "_").toUpperCase();
}
