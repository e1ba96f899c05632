// The calls that one generation takes: its start, and what follows where one fails.
//
// A start of which nothing arrived is sent again, where that can help. Later on the generation is
// resumed, by the id that the server gave it and the tokens that have arrived, so that no token is
// lost and none comes twice. Both end after `Retries::max_attempts` calls in a row without a token.
#pragma once

#include <chrono>
#include <functional>
#include <optional>

#include "collector.h"
#include "millrace/retries.h"

namespace millrace {

/// What a stream asks next, and whether it asks again.
class Attempts {
 public:
  using Milliseconds = std::chrono::milliseconds;
  using Clock = std::chrono::steady_clock;

  /// @param command the first request, a start or a resume.
  /// @param collector what has arrived, which the stream feeds; outlives this.
  /// @param now a start's deadline counts from its first call.
  Attempts(pb::GenerateStreamRequest command, const Collector& collector, Retries retries,
           std::function<Clock::time_point()> now = Clock::now);

  /// The request of the call that is opened now.
  pb::GenerateStreamRequest open();

  /// What is left for the call that is opened now; nothing: it may take its time.
  std::optional<Milliseconds> timeout() const;

  /// How long to wait before the next call, now that one has failed; nothing: there is none.
  std::optional<Milliseconds> delay(const MillraceError& error);

  int num_resumes() const noexcept { return num_resumes_; }

 private:
  int num_tokens() const;

  pb::GenerateStreamRequest command_;
  const Collector& collector_;
  Retries retries_;
  std::function<Clock::time_point()> now_;
  std::optional<Clock::time_point> deadline_;
  int num_resumes_ = 0;
  int num_fruitless_ = 0;
  // As they were when the running call was opened.
  int num_tokens_before_ = 0;
  int num_events_before_ = 0;
};

}  // namespace millrace
