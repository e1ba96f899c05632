// Streams the answer to a prompt: stream [ADDRESS [PROMPT]]. MILLRACE_API_KEY is its key.
#include <millrace/client.h>

#include <cstdlib>
#include <iostream>

int main(int argc, char** argv) {
  millrace::ClientOptions options;
  if (argc > 1) options.runtime = argv[1];
  if (const char* key = std::getenv("MILLRACE_API_KEY")) options.api_key = key;
  try {
    millrace::Client client(options);
    millrace::GenerateOptions ask;
    ask.max_new_tokens = 64;
    ask.timeout = std::chrono::seconds(30);
    auto stream = client.generate(argc > 2 ? argv[2] : "Once upon a time", ask);
    for (const millrace::Chunk& chunk : stream) std::cout << chunk.text << std::flush;
    std::cout << "\n" << stream.result().tokens_per_s() << " tokens/s\n";
  } catch (const millrace::MillraceError& error) {
    std::cerr << error.reason() << ": " << error.what() << "\n";
    return 1;
  }
}
