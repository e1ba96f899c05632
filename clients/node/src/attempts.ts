// The calls that one generation takes: its start, and what follows where one fails.
//
// A start of which nothing arrived is sent again, where that can help. Later on the generation is
// resumed, by the id that the server gave it and the tokens that have arrived, so that no token is
// lost and none comes twice. Both end after `Retries.maxAttempts` calls in a row without a token.

import { create } from "@bufbuild/protobuf";

import { isLostCall, type MillraceError } from "./errors.js";
import type { Collector } from "./generation.js";
import {
  ResumeGenerationSchema, type ResumeGeneration, type StartGeneration,
} from "./gen/millrace/runtime/v1/runtime_pb.js";
import type { Retries } from "./retries.js";

// A daemon ends a generation at its deadline and says so; who hears nothing waits this much longer.
const DEADLINE_GRACE_S = 0.5;

/** The first thing asked on a call, for one generation. */
export type Command =
  | { case: "start"; value: StartGeneration }
  | { case: "resume"; value: ResumeGeneration };

/** What a stream asks next, and whether it asks again. */
export class Attempts {
  numResumes = 0;
  private deadlineMs = Infinity;
  private numFruitless = 0;
  // As they were when the running call was opened.
  private numTokens = 0;
  private numEvents = 0;

  constructor(
    private readonly command: Command,
    private readonly collector: Collector,
    private readonly retries: Retries,
    private readonly nowMs: () => number = () => performance.now(),
  ) {}

  /** The command of the call that is opened now. */
  open(): Command {
    const { collector, command } = this;
    const timeout = command.case === "start" ? command.value.timeout : undefined;
    if (timeout !== undefined && this.deadlineMs === Infinity) {
      const timeoutS = Number(timeout.seconds) + timeout.nanos / 1e9 + DEADLINE_GRACE_S;
      this.deadlineMs = this.nowMs() + timeoutS * 1000;
    }
    this.numTokens = sum(collector.receivedTokens);
    this.numEvents = collector.numEvents;
    if (!collector.hasStarted) return command;
    this.numResumes += 1;
    return resumeGeneration(collector.generationId, collector.receivedTokens);
  }

  /** What is left for the call that is opened now; undefined: it may take its time. */
  timeoutMs(): number | undefined {
    if (this.deadlineMs === Infinity) return undefined;
    // Whole milliseconds of eight digits at most go on the wire, and 0 would be no limit.
    return Math.min(Math.max(Math.ceil(this.deadlineMs - this.nowMs()), 1), 99_999_999);
  }

  /** How long to wait before the next call, now that one has failed; undefined: there is none. */
  delayS(error: MillraceError): number | undefined {
    const { collector } = this;
    if (sum(collector.receivedTokens) > this.numTokens) this.numFruitless = 0;
    this.numFruitless += 1;
    // It is the generation that failed, not its call.
    if (collector.numEvents > this.numEvents && !isLostCall(error)) return undefined;
    if (collector.hasStarted && collector.generationId === "") return undefined;
    const delayS = this.retries.delayS(error, this.numFruitless);
    return delayS !== undefined && delayS * 1000 < (this.timeoutMs() ?? Infinity)
      ? delayS
      : undefined;
  }
}

/** The command that goes on with a generation after so many tokens of each sample. */
export function resumeGeneration(generationId: string, receivedTokens: readonly number[]): Command {
  const value = create(ResumeGenerationSchema, {
    generationId,
    receivedTokens: [...receivedTokens],
  });
  return { case: "resume", value };
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, number) => total + number, 0);
}
