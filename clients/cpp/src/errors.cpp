#include "millrace/errors.h"

#include <array>
#include <utility>

namespace millrace {

MillraceError::MillraceError(const std::string& message, std::string reason, grpc::StatusCode code,
                             Metadata metadata,
                             std::optional<std::chrono::milliseconds> retry_after)
    : std::runtime_error(message),
      reason_(std::move(reason)),
      code_(code),
      metadata_(std::move(metadata)),
      retry_after_(retry_after) {}

std::string to_string(grpc::StatusCode code) {
  static constexpr std::array kNames = {"OK",
                                        "CANCELLED",
                                        "UNKNOWN",
                                        "INVALID_ARGUMENT",
                                        "DEADLINE_EXCEEDED",
                                        "NOT_FOUND",
                                        "ALREADY_EXISTS",
                                        "PERMISSION_DENIED",
                                        "RESOURCE_EXHAUSTED",
                                        "FAILED_PRECONDITION",
                                        "ABORTED",
                                        "OUT_OF_RANGE",
                                        "UNIMPLEMENTED",
                                        "INTERNAL",
                                        "UNAVAILABLE",
                                        "DATA_LOSS",
                                        "UNAUTHENTICATED"};
  const auto index = static_cast<std::size_t>(code);
  return index < kNames.size() ? kNames[index] : "UNKNOWN";
}

}  // namespace millrace
