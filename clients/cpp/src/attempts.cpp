#include "attempts.h"

#include <google/protobuf/util/time_util.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "call_errors.h"
#include "commands.h"

namespace millrace {
namespace {

// A daemon ends a generation at its deadline and says so; who hears nothing waits this much longer.
constexpr std::chrono::milliseconds kDeadlineGrace{500};

}  // namespace

Attempts::Attempts(pb::GenerateStreamRequest command, const Collector& collector, Retries retries,
                   std::function<Clock::time_point()> now)
    : command_(std::move(command)),
      collector_(collector),
      retries_(retries),
      now_(std::move(now)) {}

pb::GenerateStreamRequest Attempts::open() {
  if (!deadline_ && command_.start().has_timeout()) {
    using google::protobuf::util::TimeUtil;
    const Milliseconds timeout(TimeUtil::DurationToMilliseconds(command_.start().timeout()));
    deadline_ = now_() + timeout + kDeadlineGrace;
  }
  num_tokens_before_ = num_tokens();
  num_events_before_ = collector_.num_events();
  if (!collector_.has_started()) return command_;
  num_resumes_ += 1;
  return resume_generation(collector_.generation_id(), collector_.received_tokens());
}

std::optional<Attempts::Milliseconds> Attempts::timeout() const {
  if (!deadline_) return std::nullopt;
  return std::max(std::chrono::ceil<Milliseconds>(*deadline_ - now_()), Milliseconds::zero());
}

std::optional<Attempts::Milliseconds> Attempts::delay(const MillraceError& error) {
  if (num_tokens() > num_tokens_before_) num_fruitless_ = 0;
  num_fruitless_ += 1;
  // It is the generation that failed, not its call.
  if (collector_.num_events() > num_events_before_ && !is_lost_call(error)) return std::nullopt;
  if (collector_.has_started() && collector_.generation_id().empty()) return std::nullopt;
  const std::optional<Milliseconds> delay = retries_.delay(error, num_fruitless_);
  const std::optional<Milliseconds> left = timeout();
  return delay && left && *delay >= *left ? std::nullopt : delay;
}

int Attempts::num_tokens() const {
  const std::vector<int>& received = collector_.received_tokens();
  return std::accumulate(received.begin(), received.end(), 0);
}

}  // namespace millrace
