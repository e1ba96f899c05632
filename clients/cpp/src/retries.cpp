#include "millrace/retries.h"

#include <cmath>
#include <random>

#include "call_errors.h"

namespace millrace {

std::optional<std::chrono::milliseconds> Retries::delay(const MillraceError& error,
                                                        int attempt) const {
  if (attempt >= max_attempts) return std::nullopt;
  using Milliseconds = std::chrono::duration<double, std::milli>;
  std::optional<Milliseconds> delay = error.retry_after();
  if (!delay && is_lost_call(error)) delay = Milliseconds(first_delay) * std::exp2(attempt - 1);
  if (!delay || *delay > max_delay) return std::nullopt;
  // Spread out, so that refused clients do not come back all at once.
  std::random_device device;
  *delay *= std::uniform_real_distribution(1.0, 1.25)(device);
  return std::chrono::ceil<std::chrono::milliseconds>(*delay);
}

}  // namespace millrace
