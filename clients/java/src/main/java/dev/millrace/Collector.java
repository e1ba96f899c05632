package dev.millrace;

import com.google.protobuf.Duration;
import dev.millrace.runtime.v1.Event;
import dev.millrace.runtime.v1.GenerationFinished;
import dev.millrace.runtime.v1.SampleFinish;
import dev.millrace.runtime.v1.TokenChunk;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.Optional;
import java.util.OptionalInt;

/**
 * Turns the events of one generation into chunks, and at the end into a {@link Generation}. Safe to
 * ask from any thread.
 */
final class Collector {
  private final List<Answer> answers = new ArrayList<>();
  private String generationId;
  private long seed;
  private int numEvents;
  private GenerationFinished finished;

  /**
   * An empty one.
   *
   * @param generationId of a generation that is resumed; the server names others.
   * @param receivedTokens that the reader had of it before, by sample.
   */
  Collector(String generationId, List<Integer> receivedTokens) {
    this.generationId = generationId;
    for (int tokens : receivedTokens) {
      answers.add(new Answer(tokens));
    }
  }

  /**
   * The chunk that an event brings, if it is one.
   *
   * @throws MillraceException the generation failed.
   */
  synchronized Optional<Chunk> take(Event event) {
    if (event.hasError()) {
      throw Errors.fromStatus(event.getError());
    }
    numEvents += 1;
    if (event.hasStarted()) {
      seed = event.getStarted().getSeed();
      generationId = event.getStarted().getGenerationId();
    } else if (event.hasFinished()) {
      finished = event.getFinished();
    } else if (event.hasTokens()) {
      return Optional.of(takeTokens(event.getTokens()));
    }
    return Optional.empty();
  }

  /** How many events have arrived, errors aside. */
  synchronized int numEvents() {
    return numEvents;
  }

  /** Names the generation; "" before it has started, and where it cannot be resumed. */
  synchronized String generationId() {
    return generationId;
  }

  /** Tokens that have arrived, by sample. */
  synchronized List<Integer> receivedTokens() {
    return answers.stream().map(answer -> answer.numReceived).toList();
  }

  /** Whether the last event has arrived. */
  synchronized boolean hasFinished() {
    return finished != null;
  }

  /** The finished generation; empty while it has not finished. */
  synchronized Optional<Generation> result(int numResumes) {
    if (finished == null) {
      return Optional.empty();
    }
    var usage = finished.getUsage();
    var timings = finished.getTimings();
    return Optional.of(
        new Generation(
            finished.getSamplesList().stream()
                .sorted(Comparator.comparingInt(SampleFinish::getSampleIndex))
                .map(this::sample)
                .toList(),
            seed,
            usage.getPromptTokens(),
            usage.getCachedPromptTokens(),
            usage.getGeneratedTokens(),
            duration(timings.getQueued()),
            duration(timings.getTimeToFirstToken()),
            duration(timings.getTotal()),
            numResumes));
  }

  private Chunk takeTokens(TokenChunk tokens) {
    while (answers.size() <= tokens.getSampleIndex()) {
      answers.add(new Answer(0));
    }
    Answer answer = answers.get(tokens.getSampleIndex());
    answer.numReceived += tokens.getTokenIdsCount();
    answer.text.append(tokens.getText());
    answer.tokenIds.addAll(tokens.getTokenIdsList());
    return new Chunk(
        tokens.getText(),
        tokens.getTokenIdsList(),
        tokens.getSampleIndex(),
        tokens.getLogprobsList(),
        tokens.getPromptLogprobsList());
  }

  private Sample sample(SampleFinish end) {
    int index = end.getSampleIndex();
    Answer answer = index < answers.size() ? answers.get(index) : new Answer(0);
    return new Sample(
        answer.text.toString(),
        List.copyOf(answer.tokenIds),
        FinishReason.of(end.getReason()),
        end.getStopString(),
        end.hasStopTokenId() ? OptionalInt.of(end.getStopTokenId()) : OptionalInt.empty());
  }

  private static java.time.Duration duration(Duration duration) {
    return java.time.Duration.ofSeconds(duration.getSeconds(), duration.getNanos());
  }

  /** What has arrived of one sample; before a resume by hand, without its text. */
  private static final class Answer {
    private final StringBuilder text = new StringBuilder();
    private final List<Integer> tokenIds = new ArrayList<>();
    private int numReceived;

    private Answer(int numReceived) {
      this.numReceived = numReceived;
    }
  }
}
