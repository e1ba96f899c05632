package dev.millrace;

import java.util.Arrays;
import java.util.List;

/** What a generation continues: text, token ids, or messages for the model's chat template. */
public sealed interface Prompt {
  /**
   * Text, which the engine's tokenizer takes apart.
   *
   * @param text the text.
   */
  record Text(String text) implements Prompt {}

  /**
   * Token ids in the engine's vocabulary, used as they are.
   *
   * @param ids the ids.
   */
  record TokenIds(List<Integer> ids) implements Prompt {
    /**
     * Keeps a copy of the ids.
     *
     * @param ids the ids.
     */
    public TokenIds {
      ids = List.copyOf(ids);
    }
  }

  /**
   * A conversation.
   *
   * @param messages in order; at least one.
   */
  record Chat(List<Message> messages) implements Prompt {
    /**
     * Keeps a copy of the messages.
     *
     * @param messages in order; at least one.
     */
    public Chat {
      messages = List.copyOf(messages);
    }
  }

  /**
   * One turn of a conversation.
   *
   * @param role {@code system}, {@code user}, {@code assistant}, or another that the template knows.
   * @param content what was said.
   */
  record Message(String role, String content) {}

  /**
   * A prompt of text.
   *
   * @param text the text.
   * @return the prompt.
   */
  static Prompt text(String text) {
    return new Text(text);
  }

  /**
   * A prompt of token ids.
   *
   * @param ids in the engine's vocabulary.
   * @return the prompt.
   */
  static Prompt tokenIds(int... ids) {
    return new TokenIds(Arrays.stream(ids).boxed().toList());
  }

  /**
   * A prompt of messages.
   *
   * @param messages in order; at least one.
   * @return the prompt.
   */
  static Prompt chat(Message... messages) {
    return new Chat(List.of(messages));
  }
}
