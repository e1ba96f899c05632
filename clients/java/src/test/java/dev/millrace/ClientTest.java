package dev.millrace;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Flow;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;

/** Wrong uses, and what needs no server. */
@Timeout(120)
class ClientTest {
  private static final Retries ONCE = Retries.NONE;

  @Test
  void keyDoesNotCrossNetworkInPlaintext() {
    Client.Builder builder = Client.builder().runtime("runtime:7602").apiKey("mr_x");
    var error = assertThrows(IllegalArgumentException.class, builder::build);
    assertTrue(error.getMessage().contains("over TLS alone"), error.getMessage());
  }

  @Test
  void certificateWithoutCaIsRefused() {
    Client.Builder builder = Client.builder().tlsCertificate(Path.of("a.crt"), Path.of("a.key"));
    var error = assertThrows(IllegalArgumentException.class, builder::build);
    assertTrue(error.getMessage().contains("go together"), error.getMessage());
  }

  @Test
  void missingCaIsNamed() {
    Client.Builder builder = Client.builder().tlsCa(Path.of("no-such.crt"));
    var error = assertThrows(IllegalArgumentException.class, builder::build);
    assertTrue(error.getMessage().contains("no-such.crt"), error.getMessage());
  }

  @Test
  void fileThatIsNoCertificateIsNamed(@TempDir Path folder) throws IOException {
    Path file = Files.writeString(folder.resolve("ca.crt"), "no PEM");
    Client.Builder builder = Client.builder().tlsCa(file);
    var error = assertThrows(IllegalArgumentException.class, builder::build);
    assertTrue(error.getMessage().contains("ca.crt"), error.getMessage());
  }

  @Test
  void wrongAddressIsNamed() {
    var error = assertThrows(IllegalArgumentException.class, () -> Client.connect("a b:x"));
    assertTrue(error.getMessage().contains("a b:x"), error.getMessage());
  }

  @Test
  void noAttemptsAreRefused() {
    assertThrows(IllegalArgumentException.class, () -> Retries.DEFAULT.withMaxAttempts(0));
  }

  @Test
  void templateArgumentsNeedMessages() {
    var options = GenerateOptions.builder().templateArguments("{\"depth\": 1}").build();
    try (Client client = Client.connect("127.0.0.1:1")) {
      for (Prompt prompt : List.of(Prompt.text("hello"), Prompt.tokenIds(1))) {
        var error =
            assertThrows(
                IllegalArgumentException.class, () -> client.generate(prompt, options).close());
        assertTrue(error.getMessage().contains("need messages"), error.getMessage());
      }
    }
  }

  @Test
  void resultIsRefusedBeforeTheStreamWasRead() {
    try (Client client = Client.connect("127.0.0.1:1");
        Stream stream = client.generate("hello")) {
      assertThrows(IllegalStateException.class, stream::result);
    }
  }

  @Test
  void streamThatWasClosedHasNoChunks() {
    try (Client client = Client.connect("127.0.0.1:1")) {
      Stream stream = client.generate("hello");
      stream.close();
      assertTrue(!stream.iterator().hasNext());
    }
  }

  @Test
  void futureOfStreamThatWasClosedIsCancelled() {
    try (Client client = Client.connect("127.0.0.1:1")) {
      Stream stream = client.generate("hello");
      stream.close();
      assertThrows(CancellationException.class, stream.toFuture()::join);
    }
  }

  @Test
  void errorIsThrownEachTimeItIsAskedFor() {
    try (Client client = unreachable();
        Stream stream = client.generate("hello")) {
      var first = assertThrows(MillraceException.class, stream::await);
      assertEquals("UNREACHABLE", first.reason());
      assertEquals("127.0.0.1:1", first.metadata().get("address"));
      assertEquals("ClientTest.java", caller(first));
      assertThrows(MillraceException.class, stream.iterator()::hasNext);
    }
  }

  @Test
  void unaryCallOfNobodyFails() {
    try (Client client = unreachable()) {
      var error = assertThrows(MillraceException.class, client::getStatus);
      assertEquals("UNREACHABLE", error.reason());
    }
  }

  @Test
  void streamOfClosedClientIsCancelled() {
    Client client = Client.connect("127.0.0.1:1");
    client.close();
    var error = assertThrows(MillraceException.class, client.generate("hello")::await);
    assertEquals("CANCELLED", error.reason());
  }

  @Test
  void streamOfClosedSessionIsCancelled() {
    try (Client client = unreachable()) {
      Session session = client.session();
      session.close();
      var error = assertThrows(MillraceException.class, session.generate("hello")::await);
      assertEquals("CANCELLED", error.reason());
    }
  }

  @Test
  void secondReaderIsRefused() {
    try (Client client = unreachable();
        Stream stream = client.generate("hello")) {
      stream.iterator();
      CompletableFuture<Throwable> refusal = new CompletableFuture<>();
      stream.subscribe(new FirstError(refusal));
      assertEquals(IllegalStateException.class, refusal.join().getClass());
    }
  }

  @Test
  void subscriberThatAsksForNothingIsTold() {
    try (Client client = unreachable();
        Stream stream = client.generate("hello")) {
      CompletableFuture<Throwable> refusal = new CompletableFuture<>();
      stream.subscribe(
          new FirstError(refusal) {
            @Override
            public void onSubscribe(Flow.Subscription subscription) {
              subscription.request(0);
            }
          });
      assertEquals(IllegalArgumentException.class, refusal.join().getClass());
    }
  }

  @Test
  void interruptedReaderIsCancelled() {
    Retries patient = new Retries(9, Duration.ofMinutes(9), Duration.ofMinutes(9));
    try (Client client = Client.builder().runtime("127.0.0.1:1").retries(patient).build();
        Stream stream = client.generate("hello")) {
      Thread.currentThread().interrupt();
      var error = assertThrows(MillraceException.class, stream::await);
      assertEquals("CANCELLED", error.reason());
      assertTrue(Thread.interrupted());
    }
  }

  @Test
  void readmeShowsTheExampleThatIsCompiled() throws IOException {
    String readme = Files.readString(Path.of("README.md"));
    String example = Files.readString(Path.of("example/Generate.java"));
    assertTrue(readme.contains("```java\n" + example + "```"));
  }

  private static Client unreachable() {
    return Client.builder().runtime("127.0.0.1:1").retries(ONCE).build();
  }

  private static String caller(Throwable error) {
    for (StackTraceElement frame : error.getStackTrace()) {
      if (frame.getClassName().startsWith("dev.millrace.ClientTest")) {
        return frame.getFileName();
      }
    }
    return "";
  }

  private static class FirstError implements Flow.Subscriber<Chunk> {
    private final CompletableFuture<Throwable> error;

    FirstError(CompletableFuture<Throwable> error) {
      this.error = error;
    }

    @Override
    public void onSubscribe(Flow.Subscription subscription) {}

    @Override
    public void onNext(Chunk chunk) {}

    @Override
    public void onError(Throwable error) {
      this.error.complete(error);
    }

    @Override
    public void onComplete() {
      error.complete(null);
    }
  }
}
