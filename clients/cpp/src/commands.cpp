#include "commands.h"

#include <google/protobuf/util/time_util.h>

#include <stdexcept>
#include <string_view>

namespace millrace {
namespace {

// How many bytes at the head of `text` are one character; 0: it is not UTF-8 there.
// Source: RFC 3629, section 4.
std::size_t character_bytes(std::string_view text) {
  const auto at = [text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = at(0);
  if (first < 0x80) return 1;
  const std::size_t length = first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  if (length == 0 || first > 0xF4 || text.size() < length) return 0;
  // The second byte rules out overlong forms, surrogates and what lies beyond U+10FFFF.
  const unsigned char low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  if (at(1) < low || at(1) > high) return 0;
  for (std::size_t i = 2; i < length; ++i) {
    if ((at(i) & 0xC0) != 0x80) return 0;
  }
  return length;
}

const std::string& utf8(const std::string& text) {
  for (std::size_t i = 0, length = 0; i < text.size(); i += length) {
    length = character_bytes(std::string_view(text).substr(i));
    if (length == 0) {
      throw std::invalid_argument("text is to be UTF-8: it is not at byte " + std::to_string(i));
    }
  }
  return text;
}

void set_prompt(pb::StartGeneration& start, const Prompt& prompt) {
  if (const auto* text = std::get_if<std::string>(&prompt)) {
    start.set_text(utf8(*text));
  } else if (const auto* ids = std::get_if<std::vector<std::uint32_t>>(&prompt)) {
    start.mutable_token_ids()->mutable_ids()->Assign(ids->begin(), ids->end());
  } else {
    for (const Message& message : std::get<std::vector<Message>>(prompt)) {
      pb::ChatMessage& turn = *start.mutable_chat()->add_messages();
      turn.set_role(utf8(message.role));
      turn.set_content(utf8(message.content));
    }
  }
}

void set_sampling(pb::SamplingParams& sampling, const GenerateOptions& options) {
  sampling.set_temperature(options.temperature);
  sampling.set_top_k(options.top_k);
  if (options.top_p) sampling.set_top_p(*options.top_p);
  sampling.set_min_p(options.min_p);
  if (options.repetition_penalty) sampling.set_repetition_penalty(*options.repetition_penalty);
  sampling.set_presence_penalty(options.presence_penalty);
  sampling.set_frequency_penalty(options.frequency_penalty);
  sampling.mutable_logit_bias()->insert(options.logit_bias.begin(), options.logit_bias.end());
  if (options.seed) sampling.set_seed(*options.seed);
  sampling.set_n(options.n);
  sampling.set_logprobs(options.logprobs);
  sampling.set_top_logprobs(options.top_logprobs);
  sampling.set_prompt_logprobs(options.prompt_logprobs);
}

void set_stop(pb::StopConditions& stop, const GenerateOptions& options) {
  stop.set_max_new_tokens(options.max_new_tokens);
  stop.set_min_new_tokens(options.min_new_tokens);
  for (const std::string& text : options.stop) stop.add_strings(utf8(text));
  stop.mutable_token_ids()->Assign(options.stop_token_ids.begin(), options.stop_token_ids.end());
  stop.set_ignore_end_tokens(options.ignore_end_tokens);
}

}  // namespace

pb::GenerateStreamRequest start_generation(const Prompt& prompt, const GenerateOptions& options) {
  pb::GenerateStreamRequest request;
  pb::StartGeneration& start = *request.mutable_start();
  set_prompt(start, prompt);
  if (!options.template_arguments.empty()) {
    if (!start.has_chat()) {
      throw std::invalid_argument("template_arguments need messages, which go through a template");
    }
    start.mutable_chat()->set_template_arguments(utf8(options.template_arguments));
  }
  set_sampling(*start.mutable_sampling(), options);
  set_stop(*start.mutable_stop(), options);
  if (options.timeout) {
    using google::protobuf::util::TimeUtil;
    *start.mutable_timeout() = TimeUtil::MillisecondsToDuration(options.timeout->count());
  }
  start.set_priority(options.priority);
  start.set_model(utf8(options.model));
  return request;
}

pb::GenerateStreamRequest resume_generation(const std::string& generation_id,
                                            const std::vector<int>& received_tokens) {
  pb::GenerateStreamRequest request;
  pb::ResumeGeneration& resume = *request.mutable_resume();
  resume.set_generation_id(utf8(generation_id));
  resume.mutable_received_tokens()->Assign(received_tokens.begin(), received_tokens.end());
  return request;
}

pb::GenerateRequest named(const pb::GenerateStreamRequest& request, const std::string& request_id) {
  pb::GenerateRequest one_of_many;
  if (request.has_resume()) {
    *one_of_many.mutable_resume() = request.resume();
    one_of_many.mutable_resume()->set_request_id(request_id);
    one_of_many.mutable_resume()->set_credit_tokens(kCreditTokens);
  } else {
    *one_of_many.mutable_start() = request.start();
    one_of_many.mutable_start()->set_request_id(request_id);
    one_of_many.mutable_start()->set_credit_tokens(kCreditTokens);
  }
  return one_of_many;
}

}  // namespace millrace
