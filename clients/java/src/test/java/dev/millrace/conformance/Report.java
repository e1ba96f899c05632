package dev.millrace.conformance;

import com.google.gson.Gson;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.gson.JsonPrimitive;
import dev.millrace.Chunk;
import dev.millrace.Generation;
import dev.millrace.MillraceException;
import dev.millrace.Sample;
import dev.millrace.Stream;
import dev.millrace.runtime.v1.TokenLogprob;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.List;

/** What came of one generation, as the suite writes it. */
final class Report {
  private static final Gson GSON = new Gson();

  private final JsonObject action;
  private final JsonArray chunks = new JsonArray();
  private final JsonArray logprobs = new JsonArray();
  private final JsonArray promptLogprobs = new JsonArray();
  private int numChunks;
  private int numBytes;

  Report(JsonObject action) {
    this.action = action;
  }

  /** Notes a chunk; false once the action says to leave. */
  boolean take(Chunk chunk) {
    numChunks += 1;
    numBytes += chunk.text().getBytes(StandardCharsets.UTF_8).length;
    if (!isTerse()) {
      chunks.add(chunk.text());
      logprobs.add(entries(chunk.logprobs()));
      promptLogprobs.add(entries(chunk.promptLogprobs()));
    }
    return !isNow("cancel_after_chunks");
  }

  /** Whether the reader rests now, and then asks for the server's status. */
  boolean isPause() {
    return isNow("pause_after_chunks");
  }

  /** For how long. */
  Duration pause() {
    return Duration.ofMillis(Math.round(action.get("pause_s").getAsDouble() * 1000));
  }

  /** The result, when the stream has ended without an error. */
  JsonObject finish(Stream stream, boolean isLeft) {
    JsonObject told = soFar(isLeft ? "cancelled" : "finished");
    told.addProperty("num_resumes", stream.numResumes());
    told.add("received_tokens", GSON.toJsonTree(stream.receivedTokens()));
    if (!isLeft && !isTerse()) {
      tell(stream.result(), told);
    }
    return told;
  }

  /** The result, when it has ended with one. */
  JsonObject fail(MillraceException error) {
    JsonObject told = new JsonObject();
    told.addProperty("reason", error.reason());
    told.addProperty("code", error.code().name());
    told.addProperty("message", error.getMessage());
    told.add("metadata", GSON.toJsonTree(error.metadata()));
    told.add(
        "retry_after_s",
        error.retryAfter().<JsonElement>map(Report::seconds).orElse(JsonNull.INSTANCE));
    JsonObject result = soFar("error");
    result.add("error", told);
    return result;
  }

  private JsonObject soFar(String ended) {
    JsonObject told = new JsonObject();
    told.addProperty("ended", ended);
    told.addProperty("num_chunks", numChunks);
    told.addProperty("num_bytes", numBytes);
    if (!isTerse()) {
      told.add("chunks", chunks);
      told.add("logprobs", logprobs);
      told.add("prompt_logprobs", promptLogprobs);
    }
    return told;
  }

  private static void tell(Generation result, JsonObject told) {
    JsonArray samples = new JsonArray();
    for (Sample sample : result.samples()) {
      JsonObject one = new JsonObject();
      one.addProperty("text", sample.text());
      one.add("token_ids", GSON.toJsonTree(sample.tokenIds()));
      one.addProperty("finish_reason", sample.finishReason().name().toLowerCase());
      one.addProperty("stop_string", sample.stopString());
      boolean hasId = sample.stopTokenId().isPresent();
      one.addProperty("stop_token_id", hasId ? sample.stopTokenId().getAsInt() : null);
      samples.add(one);
    }
    told.addProperty("text", result.text());
    told.add("samples", samples);
    told.addProperty("seed", Long.toUnsignedString(result.seed()));
    told.addProperty("prompt_tokens", result.promptTokens());
    told.addProperty("cached_prompt_tokens", result.cachedPromptTokens());
    told.addProperty("generated_tokens", result.generatedTokens());
    told.add("queued_s", seconds(result.queued()));
    told.add("time_to_first_token_s", seconds(result.timeToFirstToken()));
    told.add("total_s", seconds(result.total()));
    told.addProperty("tokens_per_s", result.tokensPerSecond());
  }

  private static JsonArray entries(List<TokenLogprob> entries) {
    JsonArray told = new JsonArray();
    for (TokenLogprob entry : entries) {
      JsonArray top = new JsonArray();
      entry.getTopList().forEach(one -> top.add(candidate(one.getTokenId(), one.getLogprob())));
      JsonObject token = candidate(entry.getTokenId(), entry.getLogprob());
      token.addProperty("rank", entry.getRank());
      token.add("top", top);
      told.add(token);
    }
    return told;
  }

  private static JsonObject candidate(int tokenId, float logprob) {
    JsonObject told = new JsonObject();
    told.addProperty("token_id", tokenId);
    told.addProperty("logprob", logprob);
    return told;
  }

  private boolean isNow(String key) {
    return action.has(key) && action.get(key).getAsInt() == numChunks;
  }

  private boolean isTerse() {
    return action.has("terse");
  }

  private static JsonPrimitive seconds(Duration duration) {
    return new JsonPrimitive(duration.toNanos() / 1e9);
  }
}
