// One generation read with `for await`, over a call of its own or a shared one.

import { setTimeout as sleep } from "node:timers/promises";

import { Attempts, type Command } from "./attempts.js";
import { callEnded, fromCallError, type MillraceError } from "./errors.js";
import { Collector, type Chunk, type Generation } from "./generation.js";
import type { Event } from "./gen/millrace/runtime/v1/runtime_pb.js";
import type { Retries } from "./retries.js";

/** Sends a command and gives what comes of it, to the terminal event; aborting `signal` ends it. */
export type OpenCall = (
  command: Command,
  signal: AbortSignal,
  timeoutMs: number | undefined,
) => AsyncIterable<readonly Event[]>;

/**
 * One generation: iterate it for chunks; leaving the loop, `close` and the caller's `signal` cancel
 * what still runs.
 *
 * A start that the daemon refuses with a retry delay is tried again as long as nothing arrived. A
 * connection to a gateway that is lost later is made anew, and the generation goes on where it was.
 */
export class Stream implements AsyncIterable<Chunk> {
  private readonly collector: Collector;
  private readonly attempts: Attempts;
  private readonly ending = new AbortController();
  private readonly chunks: AsyncGenerator<Chunk, void>;

  constructor(
    private readonly openCall: OpenCall,
    command: Command,
    private readonly address: string,
    retries: Retries,
    signal?: AbortSignal,
  ) {
    const { generationId, receivedTokens } =
      command.case === "resume" ? command.value : { generationId: "", receivedTokens: [] };
    this.collector = new Collector(generationId, [...receivedTokens]);
    this.attempts = new Attempts(command, this.collector, retries);
    this.chunks = this.read(signal);
  }

  /** Names it for `Client.resume`; "" before it has started, and where it cannot be resumed. */
  get generationId(): string {
    return this.collector.generationId;
  }

  /** Tokens that have arrived, by sample. */
  get receivedTokens(): readonly number[] {
    return [...this.collector.receivedTokens];
  }

  /** How often its connection was lost and it went on over another one. */
  get numResumes(): number {
    return this.attempts.numResumes;
  }

  /** The finished generation. Throws while the stream was not read to its end. */
  get result(): Generation {
    if (this.collector.result === undefined) {
      throw new Error("the generation has not finished: read the stream to its end first");
    }
    return this.collector.result;
  }

  [Symbol.asyncIterator](): AsyncIterator<Chunk> {
    return this.chunks;
  }

  /** Reads what is left, and gives the finished generation. */
  async wait(): Promise<Generation> {
    for await (const _ of this.chunks);
    return this.result;
  }

  /** Cancels what still runs; reading ends. A no-op on a stream that has ended. */
  close(): void {
    this.ending.abort();
  }

  private async *read(signal: AbortSignal | undefined): AsyncGenerator<Chunk, void> {
    const abort = () => this.ending.abort();
    if (signal?.aborted) abort();
    signal?.addEventListener("abort", abort);
    try {
      while (!this.ending.signal.aborted) {
        let error: MillraceError;
        try {
          yield* this.readCall();
          if (this.collector.result !== undefined) return;
          error = callEnded(this.address);
        } catch (raised) {
          if (this.collector.result !== undefined) return; // it had ended before its call broke
          error = fromCallError(raised, this.address);
        }
        if (this.ending.signal.aborted) break;
        const delayS = this.attempts.delayS(error);
        if (delayS === undefined) throw error;
        // Woken by `close`, which the loop then sees.
        await sleep(delayS * 1000, undefined, { signal: this.ending.signal }).catch(() => {});
      }
      signal?.throwIfAborted();
    } finally {
      signal?.removeEventListener("abort", abort);
      abort();
    }
  }

  private async *readCall(): AsyncGenerator<Chunk, void> {
    const command = this.attempts.open();
    const call = this.openCall(command, this.ending.signal, this.attempts.timeoutMs());
    for await (const events of call) {
      for (const chunk of this.collector.takeAll(events)) {
        yield chunk;
        if (this.ending.signal.aborted) return; // what had arrived already is not read either
      }
    }
  }
}
