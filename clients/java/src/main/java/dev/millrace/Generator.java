package dev.millrace;

/** What generates: a {@link Client}, on a call each, or a {@link Session}, on one for all. */
public sealed interface Generator permits Client, Session {
  /**
   * A generation, as a stream of chunks; it starts when the stream is read. Closing the stream
   * cancels what still runs.
   *
   * @param prompt what to continue.
   * @param options how.
   * @return the stream, to be closed.
   */
  Stream generate(Prompt prompt, GenerateOptions options);

  /**
   * As {@link #generate(Prompt, GenerateOptions)}, of a text.
   *
   * @param text what to continue.
   * @param options how.
   * @return the stream, to be closed.
   */
  default Stream generate(String text, GenerateOptions options) {
    return generate(Prompt.text(text), options);
  }

  /**
   * As {@link #generate(Prompt, GenerateOptions)}, of a text, with the {@linkplain
   * GenerateOptions#DEFAULT default} options.
   *
   * @param text what to continue.
   * @return the stream, to be closed.
   */
  default Stream generate(String text) {
    return generate(Prompt.text(text), GenerateOptions.DEFAULT);
  }
}
