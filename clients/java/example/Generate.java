import dev.millrace.Chunk;
import dev.millrace.Client;
import dev.millrace.GenerateOptions;
import dev.millrace.Stream;

class Generate {
  public static void main(String[] arguments) {
    var options = GenerateOptions.builder().maxNewTokens(64).temperature(0.8).build();
    try (Client client = Client.connect(arguments[0]);
        Stream stream = client.generate("Once upon a time", options)) {
      for (Chunk chunk : stream) System.out.print(chunk.text());
      System.out.printf("%n%.0f tokens/s%n", stream.result().tokensPerSecond());
    }
  }
}
