// What a call can throw: one exception, with everything that the daemon said.
#pragma once

#include <grpcpp/support/status_code_enum.h>

#include <chrono>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

namespace millrace {

/// A call or a generation failed; `what()` is one sentence for people.
class MillraceError : public std::runtime_error {
 public:
  using Metadata = std::map<std::string, std::string>;

  MillraceError(const std::string& message, std::string reason, grpc::StatusCode code,
                Metadata metadata = {},
                std::optional<std::chrono::milliseconds> retry_after = std::nullopt);

  /// For programs, such as `PROMPT_TOO_LONG`; docs/API.md lists them. `UNREACHABLE` where no daemon
  /// answered or the connection was lost; the name of the code where a status carried no reason.
  const std::string& reason() const noexcept { return reason_; }

  grpc::StatusCode code() const noexcept { return code_; }

  /// The values that the message speaks of.
  const Metadata& metadata() const noexcept { return metadata_; }

  /// Set where trying again can help: wait this long first.
  std::optional<std::chrono::milliseconds> retry_after() const noexcept { return retry_after_; }

 private:
  std::string reason_;
  grpc::StatusCode code_;
  Metadata metadata_;
  std::optional<std::chrono::milliseconds> retry_after_;
};

/// A code as gRPC writes it, such as `INVALID_ARGUMENT`.
std::string to_string(grpc::StatusCode code);

}  // namespace millrace
