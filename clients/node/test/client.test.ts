// What the conformance suite cannot ask for: wrong uses, and times that pass.

import assert from "node:assert/strict";
import { test } from "node:test";

import { create } from "@bufbuild/protobuf";

import { Attempts, type Command } from "../src/attempts.js";
import { MillraceError, UNREACHABLE } from "../src/errors.js";
import { Collector, startGeneration, type GenerateOptions } from "../src/generation.js";
import { EventSchema } from "../src/gen/millrace/runtime/v1/runtime_pb.js";
import { Client, Retries } from "../src/index.js";

const lost = new MillraceError("lost", UNREACHABLE, "UNAVAILABLE");

function started(generationId: string) {
  return create(EventSchema, { event: { case: "started", value: { generationId } } });
}

function attempts(timeoutS: number | undefined, nowMs = () => 0) {
  const command: Command = { case: "start", value: startGeneration("hello", { timeoutS }) };
  const collector = new Collector();
  return { collector, attempts: new Attempts(command, collector, new Retries(3), nowMs) };
}

test("a key does not cross a network in plaintext", () => {
  assert.throws(() => new Client({ runtime: "runtime:7602", apiKey: "mr_x" }), /over TLS alone/);
});

test("half of a certificate is refused", () => {
  assert.throws(() => new Client({ tlsCa: "ca.crt", tlsCert: "client.crt" }), /go together/);
});

test("a prompt is not a mix of ids and messages", () => {
  const mix = [1, { role: "user", content: "hi" }] as unknown as number[];
  assert.throws(() => startGeneration(mix, {}), /not a mix/);
});

test("what the wire cannot carry is refused at once", () => {
  const messages = [{ role: "user", content: "hi" }];
  for (const [options, says] of [
    [{ maxTokens: 5 }, /unknown option maxTokens/],
    [{ maxNewTokens: 1.5 }, /max_new_tokens/],
    [{ temperature: "hot" }, /temperature/],
    [{ seed: -1 }, /seed/],
    [{ seed: 0.5 }, /0\.5/],
    [{ timeoutS: NaN }, /NaN/],
    [{ templateArguments: { depth: 1n } }, /BigInt/],
  ] as const) {
    const asked = () => startGeneration(messages, options as unknown as GenerateOptions);
    assert.throws(asked, (error) => error instanceof TypeError && says.test(error.message));
  }
  for (const prompt of ["hello", [1, 2], []]) {
    const asked = () => startGeneration(prompt, { templateArguments: { depth: 1 } });
    assert.throws(asked, /need messages/);
  }
});

test("a stop string and a seed may stand alone", () => {
  const { stop, sampling } = startGeneration("hello", { stop: "END", seed: 7 });
  assert.deepEqual([stop?.strings, sampling?.seed], [["END"], 7n]);
});

test("a stream has no result before it was read", () => {
  const client = new Client();
  assert.throws(() => client.generate("hello").result, /read the stream/);
  client.close();
});

test("an aborted signal ends a stream before it calls anybody", async () => {
  const client = new Client({ runtime: "127.0.0.1:1" });
  const stream = client.generate("hello", { signal: AbortSignal.abort(new Error("enough")) });
  await assert.rejects(stream.wait(), /enough/);
  client.close();
});

test("no call begins after the deadline, and none is waited for beyond it", () => {
  let nowMs = 0;
  const tried = attempts(1, () => nowMs);
  tried.attempts.open();
  assert.equal(tried.attempts.timeoutMs(), 1500);
  assert.ok(tried.attempts.delayS(lost)! < 0.2);
  nowMs = 1450;
  assert.equal(tried.attempts.delayS(lost), undefined);
});

test("losses that bring events and no token end", () => {
  const { collector, attempts: tried } = attempts(undefined);
  for (const isLast of [false, false, true]) {
    tried.open();
    assert.deepEqual([...collector.takeAll([started("x1")])], []);
    assert.equal(tried.delayS(lost) === undefined, isLast);
  }
  assert.equal(tried.numResumes, 2);
});
