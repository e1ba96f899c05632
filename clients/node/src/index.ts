// Millrace's client for Node: see README.md.
export { Client, type ClientOptions } from "./client.js";
export { MillraceError } from "./errors.js";
export type {
  Chunk, FinishReason, GenerateOptions, Generation, Message, Prompt, Sample, TokenLogprob,
} from "./generation.js";
export { Retries } from "./retries.js";
export type { Session } from "./session.js";
export type { Stream } from "./stream.js";
