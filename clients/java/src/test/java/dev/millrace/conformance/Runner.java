package dev.millrace.conformance;

import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import dev.millrace.Client;
import dev.millrace.GenerateOptions;
import dev.millrace.Generator;
import dev.millrace.MillraceException;
import dev.millrace.Prompt;
import dev.millrace.Retries;
import dev.millrace.Session;
import dev.millrace.Stream;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

/**
 * Runner of the conformance suite: a task a line on stdin, its result on stdout, as
 * clients/conformance/README.md tells. With {@code --async} streams have subscribers.
 */
public final class Runner {
  private static final Gson GSON = new GsonBuilder().serializeNulls().disableHtmlEscaping().create();

  private final ExecutorService threads =
      Executors.newCachedThreadPool(
          task -> {
            Thread thread = new Thread(task);
            thread.setDaemon(true); // a runner that fails ends
            return thread;
          });
  private final boolean isAsync;

  private Runner(boolean isAsync) {
    this.isAsync = isAsync;
  }

  /**
   * Runs tasks until there are no more.
   *
   * @param arguments {@code --async}, or nothing.
   * @throws IOException stdin broke.
   */
  public static void main(String[] arguments) throws IOException {
    Runner runner = new Runner(List.of(arguments).contains("--async"));
    var in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    var out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    for (String line = in.readLine(); line != null; line = in.readLine()) {
      JsonObject answer = new JsonObject();
      answer.add("results", runner.run(JsonParser.parseString(line).getAsJsonObject()));
      out.println(GSON.toJson(answer));
    }
  }

  private JsonArray run(JsonObject task) {
    JsonArray results = new JsonArray();
    try (Client client = client(task)) {
      for (JsonElement element : task.getAsJsonArray("do")) {
        JsonObject action = element.getAsJsonObject();
        if (!action.has("session")) {
          results.add(act(client, client, action));
          continue;
        }
        try (Session session = client.session()) {
          List<CompletableFuture<JsonObject>> running = new ArrayList<>();
          for (JsonElement one : action.getAsJsonArray("session")) {
            running.add(
                CompletableFuture.supplyAsync(
                    () -> act(client, session, one.getAsJsonObject()), threads));
          }
          running.forEach(result -> results.add(result.join()));
        }
      }
    }
    return results;
  }

  private static Client client(JsonObject task) {
    Client.Builder builder = Client.builder().runtime(task.get("address").getAsString());
    JsonObject options = task.getAsJsonObject("options");
    if (options.has("max_attempts")) {
      int maxAttempts = options.get("max_attempts").getAsInt();
      builder.retries(Retries.DEFAULT.withMaxAttempts(maxAttempts));
    }
    if (options.has("api_key")) {
      builder.apiKey(options.get("api_key").getAsString());
    }
    if (options.has("tls_ca")) {
      builder.tlsCa(Path.of(options.get("tls_ca").getAsString()));
    }
    if (options.has("tls_cert")) {
      Path certificate = Path.of(options.get("tls_cert").getAsString());
      builder.tlsCertificate(certificate, Path.of(options.get("tls_key").getAsString()));
    }
    return builder.build();
  }

  private JsonObject act(Client client, Generator generator, JsonObject action) {
    Report report = new Report(action);
    try {
      if (action.has("status")) {
        return status(client);
      }
      try (Stream stream = open(client, generator, action)) {
        boolean isLeft =
            isAsync
                ? new Subscriber(client, stream, report).hasLeft()
                : hasLeft(client, stream, report);
        return report.finish(stream, isLeft);
      }
    } catch (MillraceException error) {
      return report.fail(error);
    }
  }

  /** Reads the stream as the action says; whether that was not to its end. */
  private static boolean hasLeft(Client client, Stream stream, Report report) {
    for (var chunk : stream) {
      if (!report.take(chunk)) {
        return true;
      }
      if (report.isPause()) {
        sleep(report.pause());
        client.getStatus();
      }
    }
    return false;
  }

  private static JsonObject status(Client client) {
    var status = client.getStatus();
    JsonObject told = new JsonObject();
    told.addProperty("ended", "finished");
    told.addProperty("state", status.getState().name().substring(14).toLowerCase());
    told.addProperty("engine", status.getEngine().getName());
    told.addProperty("model", status.getEngine().getModel());
    return told;
  }

  private static Stream open(Client client, Generator generator, JsonObject action) {
    if (action.has("resume")) {
      JsonObject resume = action.getAsJsonObject("resume");
      List<Integer> receivedTokens = List.of(ints(resume.get("received_tokens")));
      return client.resume(resume.get("generation_id").getAsString(), receivedTokens);
    }
    JsonObject asked = action.getAsJsonObject("generate");
    return generator.generate(prompt(asked.remove("prompt")), options(asked));
  }

  private static Prompt prompt(JsonElement prompt) {
    if (prompt.isJsonPrimitive()) {
      return Prompt.text(prompt.getAsString());
    }
    JsonArray items = prompt.getAsJsonArray();
    return items.get(0).isJsonPrimitive()
        ? new Prompt.TokenIds(List.of(ints(items)))
        : new Prompt.Chat(List.of(GSON.fromJson(items, Prompt.Message[].class)));
  }

  private static GenerateOptions options(JsonObject asked) {
    GenerateOptions.Builder options = GenerateOptions.builder();
    for (Map.Entry<String, JsonElement> entry : asked.entrySet()) {
      JsonElement value = entry.getValue();
      switch (entry.getKey()) {
        case "max_new_tokens" -> options.maxNewTokens(value.getAsInt());
        case "min_new_tokens" -> options.minNewTokens(value.getAsInt());
        case "temperature" -> options.temperature(value.getAsDouble());
        case "top_k" -> options.topK(value.getAsInt());
        case "top_p" -> options.topP(value.getAsDouble());
        case "min_p" -> options.minP(value.getAsDouble());
        case "repetition_penalty" -> options.repetitionPenalty(value.getAsDouble());
        case "presence_penalty" -> options.presencePenalty(value.getAsDouble());
        case "frequency_penalty" -> options.frequencyPenalty(value.getAsDouble());
        case "logit_bias" -> options.logitBias(bias(value.getAsJsonObject()));
        case "seed" -> options.seed(Long.parseUnsignedLong(value.getAsString()));
        case "n" -> options.n(value.getAsInt());
        case "logprobs" -> options.logprobs(value.getAsBoolean());
        case "top_logprobs" -> options.topLogprobs(value.getAsInt());
        case "prompt_logprobs" -> options.promptLogprobs(value.getAsBoolean());
        case "stop" -> options.stop(GSON.fromJson(value, String[].class));
        case "stop_token_ids" -> options.stopTokenIds(GSON.fromJson(value, int[].class));
        case "ignore_end_tokens" -> options.ignoreEndTokens(value.getAsBoolean());
        case "timeout_s" -> options.timeout(seconds(value.getAsDouble()));
        case "priority" -> options.priority(value.getAsInt());
        case "model" -> options.model(value.getAsString());
        case "template_arguments" -> options.templateArguments(GSON.toJson(value));
        default -> throw new IllegalArgumentException("unknown option " + entry.getKey());
      }
    }
    return options.build();
  }

  private static Map<Integer, Float> bias(JsonObject value) {
    Map<Integer, Float> bias = new HashMap<>();
    value.entrySet().forEach(e -> bias.put(Integer.valueOf(e.getKey()), e.getValue().getAsFloat()));
    return bias;
  }

  private static Integer[] ints(JsonElement array) {
    return GSON.fromJson(array, Integer[].class);
  }

  private static void sleep(Duration pause) {
    try {
      Thread.sleep(pause.toMillis());
    } catch (InterruptedException interrupted) {
      throw new IllegalStateException("nobody interrupts the runner", interrupted);
    }
  }

  private static Duration seconds(double seconds) {
    return Duration.ofNanos(Math.round(seconds * 1e9));
  }
}
