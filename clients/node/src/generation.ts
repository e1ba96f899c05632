// A generation as a client sees it: how it is asked for, and what comes back.

import { create, toBinary, type MessageInitShape } from "@bufbuild/protobuf";
import type { Duration } from "@bufbuild/protobuf/wkt";

import { fromStatus } from "./errors.js";
import {
  FinishReason as WireReason, SamplingParamsSchema, StartGenerationSchema, type Event, type GenerationFinished,
  type StartGeneration, type TokenChunk, type TokenLogprob,
} from "./gen/millrace/runtime/v1/runtime_pb.js";

export type { TokenLogprob };

/** Why a sample ended; `unspecified` where a newer server has a reason that this client lacks. */
export type FinishReason = "stop_token" | "stop_string" | "length" | "cancelled" | "unspecified";

/** One turn of a conversation. */
export interface Message {
  role: string;
  content: string;
}

/** Text, token ids, or messages for the model's chat template. */
export type Prompt = string | readonly number[] | readonly Message[];

/**
 * Everything that can be asked of a generation; protos/millrace/runtime/v1 documents each. Decoding
 * is greedy unless `temperature` is set; `timeoutS` counts queueing; `signal` cancels.
 * `templateArguments` are variables of the model's chat template, of JSON's types; they need messages.
 */
export interface GenerateOptions {
  maxNewTokens?: number;
  minNewTokens?: number;
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  repetitionPenalty?: number;
  presencePenalty?: number;
  frequencyPenalty?: number;
  logitBias?: Record<number, number>;
  seed?: bigint | number;
  n?: number;
  logprobs?: boolean;
  topLogprobs?: number;
  promptLogprobs?: boolean;
  stop?: string | string[];
  stopTokenIds?: number[];
  ignoreEndTokens?: boolean;
  timeoutS?: number;
  priority?: number;
  model?: string;
  templateArguments?: Readonly<Record<string, unknown>>;
  signal?: AbortSignal;
}

/**
 * The wire form of what is asked. Throws a `TypeError` where an option does not exist, or has a value
 * that the wire cannot carry: sent, that would look like a lost connection.
 */
export function startGeneration(prompt: Prompt, options: GenerateOptions): StartGeneration {
  const {
    maxNewTokens, minNewTokens, stop, stopTokenIds, ignoreEndTokens, timeoutS, priority, model,
    templateArguments, seed, signal: _, ...sampling
  } = options;
  const unknown = Object.keys(sampling).find((name) => !(name in SamplingParamsSchema.field));
  if (unknown !== undefined) throw new TypeError(`unknown option ${unknown}`);
  try {
    const start = create(StartGenerationSchema, {
      prompt: wirePrompt(prompt, templateArguments),
      sampling: { ...sampling, seed: seed === undefined ? undefined : BigInt(seed) },
      stop: {
        maxNewTokens,
        minNewTokens,
        strings: typeof stop === "string" ? [stop] : stop,
        tokenIds: stopTokenIds,
        ignoreEndTokens,
      },
      timeout: timeoutS === undefined ? undefined : duration(timeoutS),
      priority,
      model,
    });
    toBinary(StartGenerationSchema, start); // which is what checks the values
    return start;
  } catch (error) {
    throw error instanceof TypeError ? error : new TypeError((error as Error).message);
  }
}

function wirePrompt(
  prompt: Prompt,
  templateArguments: GenerateOptions["templateArguments"],
): NonNullable<MessageInitShape<typeof StartGenerationSchema>["prompt"]> {
  const isChat = typeof prompt !== "string" && typeof prompt[0] === "object";
  if (templateArguments !== undefined && !isChat) {
    throw new TypeError("templateArguments need messages, which go through a template");
  }
  if (typeof prompt === "string") return { case: "text", value: prompt };
  const messages = prompt.filter((item): item is Message => typeof item !== "number");
  const ids = prompt.filter((item): item is number => typeof item === "number");
  if (messages.length === 0) return { case: "tokenIds", value: { ids } };
  if (ids.length > 0) {
    throw new TypeError("a prompt is text, token ids or messages, not a mix of them");
  }
  return { case: "chat", value: { messages, templateArguments: JSON.stringify(templateArguments) } };
}

/** New tokens of one sample. Their text may be empty while a character is unfinished. */
export interface Chunk {
  readonly text: string;
  readonly tokenIds: readonly number[];
  readonly sampleIndex: number;
  readonly logprobs: readonly TokenLogprob[];
  readonly promptLogprobs: readonly TokenLogprob[];
}

/** One whole answer, and what ended it. */
export interface Sample {
  readonly text: string;
  readonly tokenIds: readonly number[];
  readonly finishReason: FinishReason;
  readonly stopString: string;
  readonly stopTokenId: number | undefined;
}

/** A finished generation. `seed` repeats it exactly; `generatedTokens` counts all samples. */
export interface Generation {
  readonly text: string;
  readonly samples: readonly Sample[];
  readonly seed: bigint;
  readonly promptTokens: number;
  readonly cachedPromptTokens: number;
  readonly generatedTokens: number;
  readonly queuedS: number;
  readonly timeToFirstTokenS: number;
  readonly totalS: number;
  /** Tokens a second after the first token; 0 where there was at most one. */
  readonly tokensPerS: number;
}

/** Turns the events of one generation into chunks, and at the end into a `Generation`. */
export class Collector {
  numEvents = 0;
  hasStarted = false;
  result: Generation | undefined;
  private seed = 0n;
  private readonly texts: string[] = [];
  private readonly tokenIds: number[][] = [];

  constructor(
    public generationId = "",
    readonly receivedTokens: number[] = [],
  ) {}

  /** The chunks that `events` bring; nothing follows the end. Throws what the generation failed with. */
  *takeAll(events: readonly Event[]): Generator<Chunk> {
    for (const { event } of events) {
      if (this.result !== undefined) return;
      if (event.case === "error") throw fromStatus(event.value);
      this.numEvents += 1;
      this.hasStarted = true;
      if (event.case === "started") {
        this.seed = event.value.seed;
        this.generationId = event.value.generationId;
      } else if (event.case === "tokens") {
        yield this.takeTokens(event.value);
      } else if (event.case === "finished") {
        this.result = this.finish(event.value);
      }
    }
  }

  private takeTokens(tokens: TokenChunk): Chunk {
    const { sampleIndex, text, tokenIds, logprobs, promptLogprobs } = tokens;
    while (this.receivedTokens.length <= sampleIndex) this.receivedTokens.push(0);
    this.receivedTokens[sampleIndex]! += tokenIds.length;
    this.texts[sampleIndex] = (this.texts[sampleIndex] ?? "") + text;
    (this.tokenIds[sampleIndex] ??= []).push(...tokenIds);
    return { text, tokenIds, sampleIndex, logprobs, promptLogprobs };
  }

  private finish(finished: GenerationFinished): Generation {
    const ends = [...finished.samples].sort((a, b) => a.sampleIndex - b.sampleIndex);
    const samples = ends.map(({ sampleIndex, reason, stopString, stopTokenId }) => ({
      text: this.texts[sampleIndex] ?? "",
      tokenIds: this.tokenIds[sampleIndex] ?? [],
      finishReason: (WireReason[reason] ?? "UNSPECIFIED").toLowerCase() as FinishReason,
      stopString,
      stopTokenId,
    }));
    const { usage, timings } = finished;
    const generatedTokens = usage?.generatedTokens ?? 0;
    const timeToFirstTokenS = seconds(timings?.timeToFirstToken);
    const totalS = seconds(timings?.total);
    const rest = generatedTokens - samples.length;
    return {
      text: samples[0]?.text ?? "",
      samples,
      seed: this.seed,
      promptTokens: usage?.promptTokens ?? 0,
      cachedPromptTokens: usage?.cachedPromptTokens ?? 0,
      generatedTokens,
      queuedS: seconds(timings?.queued),
      timeToFirstTokenS,
      totalS,
      tokensPerS: rest > 0 && totalS > timeToFirstTokenS ? rest / (totalS - timeToFirstTokenS) : 0,
    };
  }
}

function duration(inSeconds: number): { seconds: bigint; nanos: number } {
  const ms = Math.round(inSeconds * 1000);
  return { seconds: BigInt(Math.trunc(ms / 1000)), nanos: (ms % 1000) * 1e6 };
}

function seconds(duration: Duration | undefined): number {
  return duration === undefined ? 0 : Number(duration.seconds) + duration.nanos / 1e9;
}
