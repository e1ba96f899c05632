// A generation as a client sees it: how it is asked for, and what comes back.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace millrace {

/// One turn of a conversation.
struct Message {
  std::string role;
  std::string content;
};

/// Text (UTF-8), token ids, or messages for the model's chat template.
using Prompt = std::variant<std::string, std::vector<std::uint32_t>, std::vector<Message>>;

/// Everything that can be asked of a generation; protos/millrace/runtime/v1 documents each.
struct GenerateOptions {
  int max_new_tokens = 0;  ///< 0: to the engine's limit.
  int min_new_tokens = 0;
  float temperature = 0;  ///< 0: greedy.
  int top_k = 0;
  std::optional<float> top_p;
  float min_p = 0;
  std::optional<float> repetition_penalty;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  std::map<std::uint32_t, float> logit_bias;
  std::optional<std::uint64_t> seed;
  int n = 0;  ///< Samples; 0 is one.
  bool logprobs = false;
  int top_logprobs = 0;
  bool prompt_logprobs = false;
  std::vector<std::string> stop;
  std::vector<std::uint32_t> stop_token_ids;
  bool ignore_end_tokens = false;
  std::optional<std::chrono::milliseconds> timeout;  ///< Queueing included.
  int priority = 0;
  std::string model;  ///< A deployment or a model of a gateway.
  /// What the chat template reads beside messages, which it needs: a JSON object of its variables,
  /// `{"enable_thinking": false}`, as text, for a template may write values into the prompt.
  std::string template_arguments;
};

/// A candidate at a token's position.
struct TopLogprob {
  std::uint32_t token_id;
  float logprob;
  std::string token;  ///< Bytes, as in `TokenLogprob`.
};

/// How likely a token was; `rank` 1 is the likeliest.
struct TokenLogprob {
  std::uint32_t token_id;
  float logprob;
  int rank;
  std::vector<TopLogprob> top;
  std::string token;  ///< Its bytes, which may be a part of a character.
};

/// New tokens of one sample.
struct Chunk {
  std::string text;  ///< What they add, UTF-8; may be empty while a character is unfinished.
  std::vector<std::uint32_t> token_ids;
  int sample_index;
  std::vector<TokenLogprob> logprobs;         ///< One per token, when asked for.
  std::vector<TokenLogprob> prompt_logprobs;  ///< When asked for; in the first chunks alone.
};

/// Why a sample ended; `unspecified` where a newer server has a reason that this client lacks.
enum class FinishReason { unspecified, stop_token, stop_string, length, cancelled };

/// As it is called above.
const char* to_string(FinishReason reason) noexcept;

/// One whole answer, and what ended it.
struct Sample {
  std::string text;
  std::vector<std::uint32_t> token_ids;
  FinishReason finish_reason;
  std::string stop_string;
  std::optional<std::uint32_t> stop_token_id;
};

/// A finished generation. Times are the daemon's, queueing included.
struct Generation {
  std::vector<Sample> samples;
  std::uint64_t seed = 0;  ///< Repeats it exactly.
  int prompt_tokens = 0;
  int cached_prompt_tokens = 0;
  int generated_tokens = 0;  ///< Over all samples.
  std::chrono::nanoseconds queued{};
  std::chrono::nanoseconds time_to_first_token{};
  std::chrono::nanoseconds total{};

  /// The first sample's.
  const std::string& text() const { return samples.at(0).text; }

  /// Tokens a second after the first token; 0 where there was at most one.
  double tokens_per_s() const noexcept;
};

}  // namespace millrace
