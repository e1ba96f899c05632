#include "collector.h"

#include <google/protobuf/util/time_util.h>

#include <algorithm>
#include <utility>

#include "call_errors.h"

namespace millrace {
namespace {

// More than any daemon draws; what is beyond is no index.
constexpr std::size_t kMaxSamples = 1 << 16;

std::chrono::nanoseconds nanoseconds(const google::protobuf::Duration& duration) {
  using google::protobuf::util::TimeUtil;
  return std::chrono::nanoseconds(TimeUtil::DurationToNanoseconds(duration));
}

std::vector<TokenLogprob> logprobs(
    const google::protobuf::RepeatedPtrField<pb::TokenLogprob>& entries) {
  std::vector<TokenLogprob> found;
  for (const pb::TokenLogprob& entry : entries) {
    TokenLogprob& one = found.emplace_back(
        TokenLogprob{entry.token_id(), entry.logprob(), entry.rank(), {}, entry.token()});
    for (const pb::TopLogprob& top : entry.top()) {
      one.top.push_back({top.token_id(), top.logprob(), top.token()});
    }
  }
  return found;
}

FinishReason finish_reason(pb::FinishReason reason) {
  switch (reason) {
    case pb::FINISH_REASON_STOP_TOKEN:
      return FinishReason::stop_token;
    case pb::FINISH_REASON_STOP_STRING:
      return FinishReason::stop_string;
    case pb::FINISH_REASON_LENGTH:
      return FinishReason::length;
    case pb::FINISH_REASON_CANCELLED:
      return FinishReason::cancelled;
    default:
      return FinishReason::unspecified;
  }
}

}  // namespace

Collector::Collector(std::string generation_id, std::vector<int> received_tokens)
    : generation_id_(std::move(generation_id)), received_tokens_(std::move(received_tokens)) {}

std::optional<Chunk> Collector::take(const pb::Event& event) {
  if (result_) return std::nullopt;
  if (event.has_error()) throw from_status(event.error());
  num_events_ += 1;
  has_started_ = true;
  if (event.has_started()) {
    seed_ = event.started().seed();
    generation_id_ = event.started().generation_id();
  } else if (event.has_tokens()) {
    return take_tokens(event.tokens());
  } else if (event.has_finished()) {
    result_ = finish(event.finished());
  }
  return std::nullopt;
}

Chunk Collector::take_tokens(const pb::TokenChunk& tokens) {
  const auto index = static_cast<std::size_t>(tokens.sample_index());
  if (index >= kMaxSamples) {
    throw MillraceError(
        "The daemon sent tokens of sample " + std::to_string(tokens.sample_index()) + ".",
        "INTERNAL", grpc::StatusCode::INTERNAL);
  }
  received_tokens_.resize(std::max(received_tokens_.size(), index + 1));
  outputs_.resize(std::max(outputs_.size(), index + 1));
  const auto& ids = tokens.token_ids();
  received_tokens_[index] += ids.size();
  outputs_[index].text += tokens.text();
  outputs_[index].token_ids.insert(outputs_[index].token_ids.end(), ids.begin(), ids.end());
  return {tokens.text(),
          {ids.begin(), ids.end()},
          tokens.sample_index(),
          logprobs(tokens.logprobs()),
          logprobs(tokens.prompt_logprobs())};
}

Generation Collector::finish(const pb::GenerationFinished& finished) const {
  std::vector<pb::SampleFinish> ends(finished.samples().begin(), finished.samples().end());
  std::sort(ends.begin(), ends.end(),
            [](const auto& a, const auto& b) { return a.sample_index() < b.sample_index(); });
  Generation generation;
  for (const pb::SampleFinish& end : ends) {
    const auto index = static_cast<std::size_t>(end.sample_index());
    const Output output = index < outputs_.size() ? outputs_[index] : Output{};
    Sample& sample = generation.samples.emplace_back(
        Sample{output.text, output.token_ids, finish_reason(end.reason()), end.stop_string(), {}});
    if (end.has_stop_token_id()) sample.stop_token_id = end.stop_token_id();
  }
  generation.seed = seed_;
  generation.prompt_tokens = finished.usage().prompt_tokens();
  generation.cached_prompt_tokens = finished.usage().cached_prompt_tokens();
  generation.generated_tokens = finished.usage().generated_tokens();
  generation.queued = nanoseconds(finished.timings().queued());
  generation.time_to_first_token = nanoseconds(finished.timings().time_to_first_token());
  generation.total = nanoseconds(finished.timings().total());
  return generation;
}

const char* to_string(FinishReason reason) noexcept {
  switch (reason) {
    case FinishReason::stop_token:
      return "stop_token";
    case FinishReason::stop_string:
      return "stop_string";
    case FinishReason::length:
      return "length";
    case FinishReason::cancelled:
      return "cancelled";
    case FinishReason::unspecified:
      break;
  }
  return "unspecified";
}

double Generation::tokens_per_s() const noexcept {
  const std::chrono::duration<double> decoding = total - time_to_first_token;
  const int rest = generated_tokens - static_cast<int>(samples.size());
  return rest > 0 && decoding.count() > 0 ? rest / decoding.count() : 0.0;
}

}  // namespace millrace
