// Sessions: many generations on one call, told apart by request ids.

import { create } from "@bufbuild/protobuf";
import type { Client as ServiceClient } from "@connectrpc/connect";

import type { Command } from "./attempts.js";
import { callEnded, closed, fromCallError, type MillraceError } from "./errors.js";
import { startGeneration, type GenerateOptions, type Prompt } from "./generation.js";
import {
  GenerateRequestSchema, type Event, type GenerateRequest, type RuntimeService,
} from "./gen/millrace/runtime/v1/runtime_pb.js";
import { Queue } from "./queue.js";
import type { Retries } from "./retries.js";
import { Stream } from "./stream.js";

/**
 * Tokens of a generation that the daemon may send before they are read: what its reader leaves
 * unread is bounded, and holds up no other one of its call.
 */
const CREDIT_TOKENS = 1024;

/**
 * Many generations on one call: the daemon sends one message a step for all of them.
 *
 * `close` cancels what still runs; its streams fail with `CANCELLED`. Where the call breaks, another
 * one takes its place, and each stream goes on there, or fails, by itself.
 */
export class Session {
  private connection: Connection | undefined;
  private nextId = 1;
  private readonly ending = new AbortController();

  constructor(
    private readonly runtime: ServiceClient<typeof RuntimeService>,
    private readonly address: string,
    private readonly retries: Retries,
    private readonly isClientClosed: () => boolean,
  ) {}

  /** As `Client.generate`, on this session's call; the daemon alone keeps `timeoutS`. */
  generate(prompt: Prompt, options: GenerateOptions = {}): Stream {
    const command: Command = { case: "start", value: startGeneration(prompt, options) };
    return new Stream(
      (asked, signal) => this.events(asked, signal),
      command,
      this.address,
      this.retries,
      options.signal,
    );
  }

  /** Ends the call, and with it what runs on it. */
  close(): void {
    this.ending.abort();
  }

  private events(command: Command, signal: AbortSignal): AsyncIterable<readonly Event[]> {
    const closedWith = () => this.closedWith();
    const failure = closedWith();
    if (failure !== undefined) throw failure;
    if (this.connection === undefined || this.connection.failure !== undefined) {
      const { signal } = this.ending;
      this.connection = new Connection(this.runtime, this.address, signal, closedWith);
    }
    return this.connection.run(command, String(this.nextId++), signal);
  }

  private closedWith(): MillraceError | undefined {
    if (this.ending.signal.aborted) return closed("session");
    return this.isClientClosed() ? closed("client") : undefined;
  }
}

/** One call, and who reads what of it. */
class Connection {
  failure: MillraceError | undefined;
  private readonly requests = new Queue<GenerateRequest>();
  private readonly readers = new Map<string, Queue<Event>>();

  constructor(
    private readonly runtime: ServiceClient<typeof RuntimeService>,
    private readonly address: string,
    signal: AbortSignal,
    private readonly closedWith: () => MillraceError | undefined,
  ) {
    void this.dispatch(signal);
  }

  async *run(
    command: Command,
    requestId: string,
    signal: AbortSignal,
  ): AsyncGenerator<readonly Event[]> {
    if (this.failure !== undefined) throw this.failure;
    const events = new Queue<Event>();
    let isRunning = true;
    const leave = () => {
      if (!isRunning) return;
      isRunning = false;
      events.end();
      this.requests.push(request({ case: "cancel", value: { requestId } }));
    };
    this.readers.set(requestId, events);
    signal.addEventListener("abort", leave);
    command.value.requestId = requestId;
    command.value.creditTokens = CREDIT_TOKENS;
    let numRead = 0; // tokens since the last credit
    this.requests.push(request(command));
    try {
      for await (const event of events) {
        if (event.event.case === "finished" || event.event.case === "error") isRunning = false;
        yield [event];
        if (event.event.case !== "tokens") continue;
        numRead += event.event.value.tokenIds.length;
        if (numRead >= CREDIT_TOKENS / 2) {
          this.requests.push(request({ case: "credit", value: { requestId, tokens: numRead } }));
          numRead = 0;
        }
      }
    } finally {
      leave(); // whoever leaves the loop over a stream comes here before its signal is aborted
      signal.removeEventListener("abort", leave);
      this.readers.delete(requestId);
    }
  }

  private async dispatch(signal: AbortSignal): Promise<void> {
    try {
      for await (const response of this.runtime.generate(this.requests, { signal })) {
        for (const event of response.events) {
          // Late events of a generation that its reader left have no queue.
          const reader = this.readers.get(event.requestId);
          reader?.push(event);
          if (event.event.case === "finished" || event.event.case === "error") reader?.end();
        }
      }
      this.failure = callEnded(this.address);
    } catch (raised) {
      this.failure = this.closedWith() ?? fromCallError(raised, this.address);
    }
    this.requests.end();
    for (const reader of this.readers.values()) reader.end(this.failure);
  }
}

function request(
  command:
    | Command
    | { case: "cancel"; value: { requestId: string } }
    | { case: "credit"; value: { requestId: string; tokens: number } },
): GenerateRequest {
  return create(GenerateRequestSchema, { command });
}
