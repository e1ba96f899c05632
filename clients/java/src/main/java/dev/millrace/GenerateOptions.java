package dev.millrace;

import dev.millrace.runtime.v1.ChatMessage;
import dev.millrace.runtime.v1.SamplingParams;
import dev.millrace.runtime.v1.StartGeneration;
import dev.millrace.runtime.v1.StopConditions;
import java.time.Duration;
import java.util.Arrays;
import java.util.List;
import java.util.Map;

/**
 * Everything that can be asked of a generation beside its prompt; protos/millrace/runtime/v1
 * documents each. Decoding is greedy unless a temperature is set. Never changes; one may serve many
 * generations.
 */
public final class GenerateOptions {
  /** Greedy, up to the engine's limit, without a deadline. */
  public static final GenerateOptions DEFAULT = builder().build();

  private final StartGeneration start;

  private GenerateOptions(StartGeneration start) {
    this.start = start;
  }

  /**
   * Options to be set one by one.
   *
   * @return a builder with nothing set.
   */
  public static Builder builder() {
    return new Builder();
  }

  /** The wire form of what is asked; template arguments need messages. */
  StartGeneration startGeneration(Prompt prompt) {
    if (start.hasChat() && !(prompt instanceof Prompt.Chat)) {
      throw new IllegalArgumentException(
          "templateArguments need messages, which go through a template");
    }
    StartGeneration.Builder asked = start.toBuilder();
    if (prompt instanceof Prompt.Text text) {
      asked.setText(text.text());
    } else if (prompt instanceof Prompt.TokenIds tokens) {
      asked.getTokenIdsBuilder().addAllIds(tokens.ids());
    } else if (prompt instanceof Prompt.Chat chat) {
      for (Prompt.Message message : chat.messages()) {
        ChatMessage.Builder turn = asked.getChatBuilder().addMessagesBuilder();
        turn.setRole(message.role()).setContent(message.content());
      }
    }
    return asked.build();
  }

  /** Sets options; what is not set is left to the daemon. */
  public static final class Builder {
    private final StartGeneration.Builder start = StartGeneration.newBuilder();
    private final SamplingParams.Builder sampling = start.getSamplingBuilder();
    private final StopConditions.Builder stop = start.getStopBuilder();

    private Builder() {}

    /**
     * Limits what is generated.
     *
     * @param tokens at most so many, of each sample.
     * @return this.
     */
    public Builder maxNewTokens(int tokens) {
      stop.setMaxNewTokens(tokens);
      return this;
    }

    /**
     * Keeps end tokens and stop strings from ending it early.
     *
     * @param tokens at least so many, of each sample.
     * @return this.
     */
    public Builder minNewTokens(int tokens) {
      stop.setMinNewTokens(tokens);
      return this;
    }

    /**
     * Draws tokens instead of taking the likeliest.
     *
     * @param temperature 0 to 100; 0 takes the likeliest.
     * @return this.
     */
    public Builder temperature(double temperature) {
      sampling.setTemperature((float) temperature);
      return this;
    }

    /**
     * Keeps the likeliest tokens.
     *
     * @param k how many; 0 keeps all.
     * @return this.
     */
    public Builder topK(int k) {
      sampling.setTopK(k);
      return this;
    }

    /**
     * Keeps the likeliest tokens up to a probability.
     *
     * @param p over 0, up to 1.
     * @return this.
     */
    public Builder topP(double p) {
      sampling.setTopP((float) p);
      return this;
    }

    /**
     * Keeps tokens that are likely beside the likeliest.
     *
     * @param p its part of the likeliest one's probability, 0 to 1.
     * @return this.
     */
    public Builder minP(double p) {
      sampling.setMinP((float) p);
      return this;
    }

    /**
     * Makes tokens of prompt and output less likely (Keskar et al. 2019, "CTRL").
     *
     * @param penalty over 0; 1 changes nothing.
     * @return this.
     */
    public Builder repetitionPenalty(double penalty) {
      sampling.setRepetitionPenalty((float) penalty);
      return this;
    }

    /**
     * Makes tokens of the output less likely.
     *
     * @param penalty taken off their logits, -2 to 2.
     * @return this.
     */
    public Builder presencePenalty(double penalty) {
      sampling.setPresencePenalty((float) penalty);
      return this;
    }

    /**
     * Makes tokens of the output less likely, the more often they occur.
     *
     * @param penalty taken off their logits per occurrence, -2 to 2.
     * @return this.
     */
    public Builder frequencyPenalty(double penalty) {
      sampling.setFrequencyPenalty((float) penalty);
      return this;
    }

    /**
     * Favours or bans tokens.
     *
     * @param bias added to their logits, by token id; -100 bans and 100 forces, nearly.
     * @return this.
     */
    public Builder logitBias(Map<Integer, Float> bias) {
      sampling.clearLogitBias().putAllLogitBias(bias);
      return this;
    }

    /**
     * Makes it repeatable; else the daemon draws a seed, which {@link Generation#seed} tells.
     *
     * @param seed 64 bits, unsigned: {@link Long#parseUnsignedLong(String)}.
     * @return this.
     */
    public Builder seed(long seed) {
      sampling.setSeed(seed);
      return this;
    }

    /**
     * Draws several samples from one prompt.
     *
     * @param samples 1 to 64.
     * @return this.
     */
    public Builder n(int samples) {
      sampling.setN(samples);
      return this;
    }

    /**
     * Reports how likely each token was.
     *
     * @param isReported whether it does.
     * @return this.
     */
    public Builder logprobs(boolean isReported) {
      sampling.setLogprobs(isReported);
      return this;
    }

    /**
     * Reports the likeliest tokens beside each token; implies {@link #logprobs}.
     *
     * @param candidates how many, at most 20.
     * @return this.
     */
    public Builder topLogprobs(int candidates) {
      sampling.setTopLogprobs(candidates);
      return this;
    }

    /**
     * Reports how likely the prompt's tokens were.
     *
     * @param isReported whether it does.
     * @return this.
     */
    public Builder promptLogprobs(boolean isReported) {
      sampling.setPromptLogprobs(isReported);
      return this;
    }

    /**
     * Ends a sample at strings, which are not part of its text.
     *
     * @param strings at most 16.
     * @return this.
     */
    public Builder stop(String... strings) {
      stop.clearStrings().addAllStrings(List.of(strings));
      return this;
    }

    /**
     * Ends a sample at tokens, beside the model's own end tokens.
     *
     * @param ids in the engine's vocabulary.
     * @return this.
     */
    public Builder stopTokenIds(int... ids) {
      stop.clearTokenIds().addAllTokenIds(Arrays.stream(ids).boxed().toList());
      return this;
    }

    /**
     * Goes on past the model's own end tokens; for benchmarks.
     *
     * @param isOn whether it does.
     * @return this.
     */
    public Builder ignoreEndTokens(boolean isOn) {
      stop.setIgnoreEndTokens(isOn);
      return this;
    }

    /**
     * Ends it with {@code DEADLINE_EXCEEDED} when it takes longer.
     *
     * @param timeout queueing, retries and resumes included.
     * @return this.
     */
    public Builder timeout(Duration timeout) {
      start.getTimeoutBuilder().setSeconds(timeout.getSeconds()).setNanos(timeout.getNano());
      return this;
    }

    /**
     * Lets it overtake others, or be overtaken.
     *
     * @param priority higher goes first, -100 to 100.
     * @return this.
     */
    public Builder priority(int priority) {
      start.setPriority(priority);
      return this;
    }

    /**
     * Says what is to answer.
     *
     * @param name of a deployment, a model or an engine.
     * @return this.
     */
    public Builder model(String name) {
      start.setModel(name);
      return this;
    }

    /**
     * Gives the model's chat template what it reads beside the messages; such options are of
     * conversations alone.
     *
     * @param json a JSON object of its variables: {@code {"enable_thinking": false}}. As text, for a
     *     template may write values into the prompt, digit for digit.
     * @return this.
     */
    public Builder templateArguments(String json) {
      start.getChatBuilder().setTemplateArguments(json);
      return this;
    }

    /**
     * What was set so far.
     *
     * @return the options.
     */
    public GenerateOptions build() {
      return new GenerateOptions(start.build());
    }
  }
}
