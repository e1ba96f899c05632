// Millrace's client for C++: see README.md.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "millrace/errors.h"
#include "millrace/generation.h"
#include "millrace/retries.h"
#include "millrace/session.h"
#include "millrace/stream.h"

namespace millrace {

namespace runtime::v1 {
class GetStatusResponse;
}

/// Where the daemon is, and how both prove who they are. Paths are of PEM files.
struct ClientOptions {
  /// `host:port` of a runtime daemon or a gateway.
  std::string runtime = "127.0.0.1:7602";
  /// `mr_...`, where the daemon asks for one.
  std::string api_key;
  /// The CA that signed the daemon's certificate; empty speaks plaintext.
  std::string tls_ca;
  /// The client's own certificate, where daemons ask for one, and its private key.
  std::string tls_cert;
  std::string tls_key;
  /// For calls that answer at once; generations take their time.
  std::chrono::milliseconds timeout{30'000};
  Retries retries{};
};

class Runtime;

/// A runtime daemon or a gateway. Any thread may use it; its streams and sessions may outlive it.
class Client {
 public:
  /// @throws std::invalid_argument a file cannot be used, or the API key would cross a network in
  ///     plaintext.
  explicit Client(ClientOptions options = {});

  /// A generation, as a stream of chunks; it starts at once.
  ///
  ///     auto stream = client.generate("Once upon a time");
  ///     for (const millrace::Chunk& chunk : stream) std::cout << chunk.text;
  ///
  /// @throws std::invalid_argument a text is not UTF-8, or template arguments have no messages.
  Stream generate(const Prompt& prompt, const GenerateOptions& options = {});

  /// Goes on with a generation of a gateway whose reader is gone, such as another process. A stream
  /// that loses its connection does so by itself.
  ///
  /// @param generation_id as `Stream::generation_id` was.
  /// @param received_tokens what its reader had, by sample; only what comes after is streamed.
  Stream resume(const std::string& generation_id, const std::vector<int>& received_tokens = {});

  /// Many generations on one call, for callers with many streams.
  Session session();

  /// What the daemon serves, its limits and its load, as generated from protos/: include
  /// `millrace/runtime/v1/runtime.pb.h` to read it.
  runtime::v1::GetStatusResponse get_status();

 private:
  std::shared_ptr<const Runtime> runtime_;
  std::chrono::milliseconds timeout_;
  Retries retries_;
};

}  // namespace millrace
