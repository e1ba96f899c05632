// The client: builds through a compile daemon, generations through a runtime daemon or a gateway.

import { readFileSync } from "node:fs";
import type { SecureClientSessionOptions } from "node:http2";
import { setTimeout as sleep } from "node:timers/promises";

import {
  createClient, type Client as ServiceClient, type Interceptor, type Transport,
} from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";

import { resumeGeneration, type Command } from "./attempts.js";
import { closed, fromCallError } from "./errors.js";
import { startGeneration, type GenerateOptions, type Prompt } from "./generation.js";
import { CompilerService } from "./gen/millrace/compiler/v1/compiler_pb.js";
import {
  RuntimeService, type Event, type GetStatusResponse,
} from "./gen/millrace/runtime/v1/runtime_pb.js";
import { Retries } from "./retries.js";
import { Session } from "./session.js";
import { Stream, type OpenCall } from "./stream.js";

const MAX_MESSAGE_BYTES = 64 << 20;

export interface ClientOptions {
  /** `host:port` of a compile daemon. */
  compiler?: string;
  /** `host:port` of a runtime daemon or a gateway. */
  runtime?: string;
  /** For calls that answer at once; builds and generations take their time. */
  timeoutS?: number;
  retries?: Retries;
  /** `mr_...`, where the daemons ask for one. */
  apiKey?: string;
  /** Path of the CA that signed the daemons' certificates (PEM); "" speaks plaintext. */
  tlsCa?: string;
  /** Path of the client's own certificate, where daemons ask for one; with `tlsKey`. */
  tlsCert?: string;
  tlsKey?: string;
}

/** Both daemons, from one place; connects when it is used. */
export class Client {
  /** The compile daemon's service as generated, for builds and engines; docs/API.md shows it. */
  readonly compiler: ServiceClient<typeof CompilerService>;
  private readonly runtime: ServiceClient<typeof RuntimeService>;
  private readonly address: string;
  private readonly retries: Retries;
  private readonly timeoutMs: number;
  private readonly managers: Http2SessionManager[] = [];
  private isClosed = false;

  constructor(options: ClientOptions = {}) {
    const { compiler = "127.0.0.1:7601", runtime = "127.0.0.1:7602" } = options;
    this.address = runtime;
    this.retries = options.retries ?? new Retries();
    this.timeoutMs = (options.timeoutS ?? 30) * 1000;
    this.compiler = createClient(CompilerService, this.connect(compiler, options));
    this.runtime = createClient(RuntimeService, this.connect(runtime, options));
  }

  /**
   * A generation, as a stream of chunks; it starts when the stream is read.
   *
   *     for await (const chunk of client.generate("Once upon a time")) use(chunk.text);
   *
   * Leaving the loop cancels what still runs.
   */
  generate(prompt: Prompt, options: GenerateOptions = {}): Stream {
    const command: Command = { case: "start", value: startGeneration(prompt, options) };
    return this.stream(command, options.signal);
  }

  /**
   * Goes on with a generation of a gateway whose reader is gone, such as another process. A stream
   * that loses its connection does so by itself.
   *
   * @param generationId as `Stream.generationId` was.
   * @param receivedTokens what its reader had, by sample; only what comes after is streamed.
   */
  resume(generationId: string, receivedTokens: number[] = [], signal?: AbortSignal): Stream {
    return this.stream(resumeGeneration(generationId, receivedTokens), signal);
  }

  /** Many generations on one call, for callers with many streams; close it when done. */
  session(): Session {
    return new Session(this.runtime, this.address, this.retries, () => this.isClosed);
  }

  /** What the runtime daemon serves, its limits and its load. */
  async getStatus(): Promise<GetStatusResponse> {
    for (let attempt = 1; ; attempt++) {
      if (this.isClosed) throw closed("client");
      try {
        return await this.runtime.getStatus({}, { timeoutMs: this.timeoutMs });
      } catch (raised) {
        const error = fromCallError(raised, this.address);
        const delayS = this.retries.delayS(error, attempt);
        if (delayS === undefined) throw error;
        await sleep(delayS * 1000);
      }
    }
  }

  /** Closes the connections; streams that still run fail with `CANCELLED`. */
  close(): void {
    this.isClosed = true; // a manager would connect again
    for (const manager of this.managers) manager.abort();
  }

  private stream(command: Command, signal?: AbortSignal): Stream {
    const open: OpenCall = (asked, ending, timeoutMs) => this.events(asked, ending, timeoutMs);
    return new Stream(open, command, this.address, this.retries, signal);
  }

  private async *events(
    command: Command,
    signal: AbortSignal,
    timeoutMs: number | undefined,
  ): AsyncGenerator<Event[]> {
    if (this.isClosed) throw closed("client");
    const options = { signal, ...(timeoutMs === undefined ? {} : { timeoutMs }) };
    const call = this.runtime.generateStream({ command }, options);
    try {
      for await (const response of call) yield response.events;
    } catch (raised) {
      throw this.isClosed ? closed("client") : raised;
    }
  }

  private connect(address: string, options: ClientOptions): Transport {
    const { apiKey = "", tlsCa = "", tlsCert = "", tlsKey = "" } = options;
    if (Boolean(tlsCert) !== Boolean(tlsKey) || (tlsCert && !tlsCa)) {
      throw new TypeError("tlsCert and tlsKey go together, and with tlsCa");
    }
    if (apiKey && !tlsCa && !isLocal(address)) {
      throw new TypeError(`an API key is sent to ${address} over TLS alone: give tlsCa`);
    }
    const nodeOptions: SecureClientSessionOptions = {};
    if (tlsCa) nodeOptions.ca = readFileSync(tlsCa);
    if (tlsCert) nodeOptions.cert = readFileSync(tlsCert);
    if (tlsKey) nodeOptions.key = readFileSync(tlsKey);
    const baseUrl = `${tlsCa ? "https" : "http"}://${address}`;
    const keepAlive = { pingIntervalMs: 30_000, pingTimeoutMs: 20_000 };
    const sessionManager = new Http2SessionManager(baseUrl, keepAlive, nodeOptions);
    this.managers.push(sessionManager);
    return createGrpcTransport({
      baseUrl,
      sessionManager,
      readMaxBytes: MAX_MESSAGE_BYTES,
      writeMaxBytes: MAX_MESSAGE_BYTES,
      interceptors: apiKey ? [withKey(apiKey)] : [],
    });
  }
}

function withKey(apiKey: string): Interceptor {
  return (next) => (request) => {
    request.header.set("authorization", `Bearer ${apiKey}`);
    return next(request);
  };
}

function isLocal(address: string): boolean {
  return /^(127\.|localhost:|\[::1\])/.test(address);
}
