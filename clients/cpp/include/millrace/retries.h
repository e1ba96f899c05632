// Whether and when a failed call is tried again.
#pragma once

#include <chrono>
#include <optional>

#include "millrace/errors.h"

namespace millrace {

/// How patient a client is.
struct Retries {
  /// Calls in all; 1 never tries again.
  int max_attempts = 4;
  /// Doubles with each attempt, where the daemon does not name a delay.
  std::chrono::milliseconds first_delay{100};
  /// A daemon that asks for a longer wait is not waited for.
  std::chrono::milliseconds max_delay{30'000};

  /// How long to wait before another try, after `attempt` calls (at least 1); nothing where there
  /// is to be none.
  std::optional<std::chrono::milliseconds> delay(const MillraceError& error, int attempt) const;
};

}  // namespace millrace
