// Runner of the conformance suite: a task a line on stdin, its result on stdout. See
// clients/conformance/README.md.

import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

import { RuntimeState, type GetStatusResponse } from "../src/gen/millrace/runtime/v1/runtime_pb.js";
import { Client, MillraceError, Retries, type Chunk, type Session, type Stream } from "../src/index.js";

type Json = any; // what the suite writes

async function main(): Promise<void> {
  for await (const line of createInterface({ input: process.stdin })) {
    const results = await run(JSON.parse(line));
    console.log(JSON.stringify({ results }, toJson));
  }
}

async function run(task: Json): Promise<Json[]> {
  const { max_attempts: maxAttempts, ...options } = task.options;
  const retries = new Retries(maxAttempts);
  const client = new Client({ runtime: task.address, retries, ...renamed(options, camel) });
  const results: Json[] = [];
  try {
    for (const action of task.do) {
      if (action.session === undefined) {
        results.push(await act(client, client, action));
        continue;
      }
      const session = client.session();
      results.push(
        ...(await Promise.all(action.session.map((one: Json) => act(client, session, one)))),
      );
      session.close();
    }
  } finally {
    client.close();
  }
  return results;
}

async function act(client: Client, generator: Client | Session, action: Json): Promise<Json> {
  const report: Json = { num_chunks: 0, num_bytes: 0 };
  if (!action.terse) Object.assign(report, { chunks: [], logprobs: [], prompt_logprobs: [] });
  try {
    if (action.status) return status(await client.getStatus());
    await read(client, open(client, generator, action), action, report);
  } catch (error) {
    if (!(error instanceof MillraceError)) throw error;
    const { message, reason, code, metadata, retryAfterS = null } = error;
    report.ended = "error";
    report.error = { message, reason, code, metadata, retry_after_s: retryAfterS };
  }
  return report;
}

function open(client: Client, generator: Client | Session, action: Json): Stream {
  if (action.resume) {
    return client.resume(action.resume.generation_id, action.resume.received_tokens);
  }
  // What a template is given is named by its author.
  const { prompt, seed, template_arguments: templateArguments, ...options } = action.generate;
  return generator.generate(prompt, {
    ...renamed(options, camel),
    ...(seed === undefined ? {} : { seed: BigInt(seed) }),
    ...(templateArguments === undefined ? {} : { templateArguments }),
  });
}

async function read(client: Client, stream: Stream, action: Json, report: Json): Promise<void> {
  let isLeft = false;
  for await (const chunk of stream) {
    take(chunk, action, report);
    if (report.num_chunks === action.cancel_after_chunks) {
      isLeft = true;
      break;
    }
    if (report.num_chunks === action.pause_after_chunks) {
      await sleep(action.pause_s * 1000);
      await client.getStatus();
    }
  }
  report.num_resumes = stream.numResumes;
  report.received_tokens = stream.receivedTokens;
  report.ended = isLeft ? "cancelled" : "finished";
  if (!isLeft && !action.terse) Object.assign(report, renamed(stream.result, snake));
}

function take(chunk: Chunk, action: Json, report: Json): void {
  report.num_chunks += 1;
  report.num_bytes += Buffer.byteLength(chunk.text);
  if (action.terse) return;
  report.chunks.push(chunk.text);
  report.logprobs.push(chunk.logprobs.map((entry) => renamed(entry, snake)));
  report.prompt_logprobs.push(chunk.promptLogprobs.map((entry) => renamed(entry, snake)));
}

function status({ state, engine }: GetStatusResponse): Json {
  const named = { engine: engine?.name ?? "", model: engine?.model ?? "" };
  return { ended: "finished", state: RuntimeState[state]!.toLowerCase(), ...named };
}

const camel = (name: string) => name.replace(/_([a-z])/g, (_, letter) => letter.toUpperCase());
const snake = (name: string) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);

function renamed(value: Json, rename: (name: string) => string): Json {
  if (Array.isArray(value)) return value.map((item) => renamed(item, rename));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.entries(value).map(([name, item]) => [rename(name), renamed(item, rename)]),
  );
}

function toJson(_: string, value: unknown): unknown {
  return typeof value === "bigint" ? value.toString() : value === undefined ? null : value;
}

await main();
