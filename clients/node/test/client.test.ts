// What the conformance suite cannot ask for: wrong uses, and times that pass.

import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http2";
import type { AddressInfo } from "node:net";
import { test } from "node:test";

import { create } from "@bufbuild/protobuf";
import { connectNodeAdapter } from "@connectrpc/connect-node";

import { Attempts, type Command } from "../src/attempts.js";
import { MillraceError, UNREACHABLE } from "../src/errors.js";
import { Collector, startGeneration, type GenerateOptions } from "../src/generation.js";
import { EventSchema, RuntimeService } from "../src/gen/millrace/runtime/v1/runtime_pb.js";
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

// A daemon of generations that can be resumed, and say two words and no more.
async function withDaemon(use: (client: Client, calls: string[]) => Promise<void>) {
  const calls: string[] = [];
  const words = ["Once", " upon"].map((text, i) => ({
    event: { case: "tokens" as const, value: { text, tokenIds: [i] } },
  }));
  const begun = [started("x1"), ...words];
  const aborted = (signal: AbortSignal) =>
    new Promise((resolve) => signal.addEventListener("abort", resolve));
  const handler = connectNodeAdapter({
    routes(router) {
      router.service(RuntimeService, {
        async *generateStream(request, { signal }) {
          calls.push(request.command.case ?? "");
          yield { events: begun };
          await aborted(signal);
        },
        async *generate(requests, { signal }) {
          for await (const { command } of requests) {
            calls.push(command.case ?? "");
            if (command.case !== "start") continue;
            const { requestId } = command.value;
            yield { events: begun.map((event) => ({ ...event, requestId })) };
          }
          await aborted(signal);
        },
      });
    },
  });
  const server = createServer(handler).listen(0, "127.0.0.1");
  await once(server, "listening");
  const client = new Client({ runtime: `127.0.0.1:${(server.address() as AddressInfo).port}` });
  try {
    await use(client, calls);
  } finally {
    client.close();
    server.close();
  }
}

const isClosed = (what: string) => (error: unknown) =>
  error instanceof MillraceError &&
  error.reason === "CANCELLED" &&
  error.message === `The ${what} was closed.`;

test("a client that was closed goes on with nothing", () =>
  withDaemon(async (client, calls) => {
    const streams = [client.generate("a"), client.session().generate("b")];
    for (const stream of streams) assert.ok(!(await stream[Symbol.asyncIterator]().next()).done);
    client.close();
    for (const stream of streams) await assert.rejects(stream.wait(), isClosed("client"));
    await assert.rejects(client.generate("c").wait(), isClosed("client"));
    await assert.rejects(client.getStatus(), isClosed("client"));
    assert.deepEqual(calls, ["start", "start"]);
  }));

test("a session that was closed fails its streams, those that are begun later too", () =>
  withDaemon(async (client, calls) => {
    const session = client.session();
    const stream = session.generate("a");
    assert.ok(!(await stream[Symbol.asyncIterator]().next()).done);
    session.close();
    await assert.rejects(stream.wait(), isClosed("session"));
    await assert.rejects(session.generate("b").wait(), isClosed("session"));
    assert.deepEqual(calls, ["start"]);
  }));

test("what had arrived of a stream that is closed is not read", () =>
  withDaemon(async (client) => {
    for (const generator of [client, client.session()]) {
      const stream = generator.generate("a");
      const texts = [];
      for await (const { text } of stream) {
        texts.push(text);
        stream.close();
      }
      assert.deepEqual(texts, ["Once"]);
    }
  }));

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
