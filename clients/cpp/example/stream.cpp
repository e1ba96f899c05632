#include <millrace/client.h>

#include <cstdlib>
#include <iostream>

// stream [ADDRESS [PROMPT]]
int main(int argc, char** argv) {
  millrace::ClientOptions where;
  if (argc > 1) where.runtime = argv[1];
  if (const char* key = std::getenv("MILLRACE_API_KEY")) where.api_key = key;
  millrace::GenerateOptions options;
  options.max_new_tokens = 64;
  options.timeout = std::chrono::seconds(30);
  try {
    millrace::Client client(where);
    // Its end of life cancels what still runs.
    auto stream = client.generate(argc > 2 ? argv[2] : "Once upon a time", options);
    for (const auto& chunk : stream) std::cout << chunk.text << std::flush;
    std::cout << "\n" << stream.result().tokens_per_s() << " tokens/s\n";
  } catch (const millrace::MillraceError& error) {
    std::cerr << error.reason() << ": " << error.what() << "\n";
    return 1;
  }
}
