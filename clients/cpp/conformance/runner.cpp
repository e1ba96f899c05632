// Runner of the conformance suite: a task a line on stdin, its result on stdout. See
// clients/conformance/README.md.
#include <millrace/client.h>
#include <millrace/runtime/v1/runtime.pb.h>

#include <algorithm>
#include <cctype>
#include <future>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

using Json = nlohmann::json;
using Seconds = std::chrono::duration<double>;

namespace {

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::round<std::chrono::milliseconds>(Seconds(seconds));
}

millrace::Prompt prompt_of(const Json& prompt) {
  if (prompt.is_string()) return prompt.get<std::string>();
  if (prompt.at(0).is_number()) return prompt.get<std::vector<std::uint32_t>>();
  std::vector<millrace::Message> messages;
  for (const Json& turn : prompt) messages.push_back({turn.at("role"), turn.at("content")});
  return messages;
}

template <typename Field>
void set(const Json& asked, const char* name, Field& field) {
  if (asked.contains(name)) field = asked.at(name).get<Field>();
}

template <typename Field>
void set(const Json& asked, const char* name, std::optional<Field>& field) {
  if (asked.contains(name)) field = asked.at(name).get<Field>();
}

millrace::GenerateOptions options_of(const Json& asked) {
  millrace::GenerateOptions options;
  set(asked, "max_new_tokens", options.max_new_tokens);
  set(asked, "min_new_tokens", options.min_new_tokens);
  set(asked, "temperature", options.temperature);
  set(asked, "top_k", options.top_k);
  set(asked, "top_p", options.top_p);
  set(asked, "min_p", options.min_p);
  set(asked, "repetition_penalty", options.repetition_penalty);
  set(asked, "presence_penalty", options.presence_penalty);
  set(asked, "frequency_penalty", options.frequency_penalty);
  if (asked.contains("logit_bias")) {
    for (const auto& [id, bias] : asked.at("logit_bias").items()) {
      options.logit_bias[static_cast<std::uint32_t>(std::stoul(id))] = bias;
    }
  }
  if (asked.contains("seed")) options.seed = std::stoull(asked.at("seed").get<std::string>());
  set(asked, "n", options.n);
  set(asked, "logprobs", options.logprobs);
  set(asked, "top_logprobs", options.top_logprobs);
  set(asked, "prompt_logprobs", options.prompt_logprobs);
  set(asked, "stop", options.stop);
  set(asked, "stop_token_ids", options.stop_token_ids);
  set(asked, "ignore_end_tokens", options.ignore_end_tokens);
  if (asked.contains("timeout_s")) options.timeout = milliseconds(asked.at("timeout_s"));
  set(asked, "priority", options.priority);
  set(asked, "model", options.model);
  if (asked.contains("template_arguments")) {
    options.template_arguments = asked.at("template_arguments").dump();
  }
  return options;
}

Json to_json(const std::vector<millrace::TokenLogprob>& logprobs) {
  Json entries = Json::array();
  for (const millrace::TokenLogprob& entry : logprobs) {
    Json top = Json::array();
    for (const millrace::TopLogprob& candidate : entry.top) {
      top.push_back({{"token_id", candidate.token_id}, {"logprob", candidate.logprob}});
    }
    entries.push_back({{"token_id", entry.token_id},
                       {"logprob", entry.logprob},
                       {"rank", entry.rank},
                       {"top", top}});
  }
  return entries;
}

Json to_json(const millrace::Generation& generation) {
  Json samples = Json::array();
  for (const millrace::Sample& sample : generation.samples) {
    samples.push_back(
        {{"text", sample.text},
         {"token_ids", sample.token_ids},
         {"finish_reason", to_string(sample.finish_reason)},
         {"stop_string", sample.stop_string},
         {"stop_token_id", sample.stop_token_id ? Json(*sample.stop_token_id) : Json()}});
  }
  return {{"samples", samples},
          {"text", generation.text()},
          {"seed", std::to_string(generation.seed)},
          {"prompt_tokens", generation.prompt_tokens},
          {"cached_prompt_tokens", generation.cached_prompt_tokens},
          {"generated_tokens", generation.generated_tokens},
          {"queued_s", Seconds(generation.queued).count()},
          {"time_to_first_token_s", Seconds(generation.time_to_first_token).count()},
          {"total_s", Seconds(generation.total).count()},
          {"tokens_per_s", generation.tokens_per_s()}};
}

Json to_json(const millrace::MillraceError& error) {
  const auto retry_after = error.retry_after();
  return {{"reason", error.reason()},
          {"code", millrace::to_string(error.code())},
          {"message", error.what()},
          {"metadata", error.metadata()},
          {"retry_after_s", retry_after ? Json(Seconds(*retry_after).count()) : Json()}};
}

Json status(millrace::Client& client) {
  const auto answer = client.get_status();
  const std::string prefix = "RUNTIME_STATE_";
  std::string state =
      millrace::runtime::v1::RuntimeState_Name(answer.state()).substr(prefix.size());
  std::transform(state.begin(), state.end(), state.begin(),
                 [](unsigned char letter) { return std::tolower(letter); });
  return {{"ended", "finished"},
          {"state", state},
          {"engine", answer.engine().name()},
          {"model", answer.engine().model()}};
}

void take(const millrace::Chunk& chunk, bool is_terse, Json& report) {
  report["num_chunks"] = report["num_chunks"].get<int>() + 1;
  report["num_bytes"] = report["num_bytes"].get<std::size_t>() + chunk.text.size();
  if (is_terse) return;
  report["chunks"].push_back(chunk.text);
  report["logprobs"].push_back(to_json(chunk.logprobs));
  report["prompt_logprobs"].push_back(to_json(chunk.prompt_logprobs));
}

void read(millrace::Client& client, millrace::Stream stream, const Json& action, Json& report) {
  const bool is_terse = action.value("terse", false);
  bool is_left = false;
  for (const millrace::Chunk& chunk : stream) {
    take(chunk, is_terse, report);
    is_left = report["num_chunks"] == action.value("cancel_after_chunks", -1);
    if (is_left) break;
    if (report["num_chunks"] == action.value("pause_after_chunks", -1)) {
      std::this_thread::sleep_for(milliseconds(action.at("pause_s")));
      client.get_status();
    }
  }
  report["num_resumes"] = stream.num_resumes();
  report["received_tokens"] = stream.received_tokens();
  report["ended"] = is_left ? "cancelled" : "finished";
  if (!is_left && !is_terse) report.update(to_json(stream.result()));
}

// `generator` is the client, or a session.
template <typename Generator>
Json act(millrace::Client& client, Generator& generator, const Json& action) {
  Json report = {{"num_chunks", 0}, {"num_bytes", 0}};
  if (!action.value("terse", false)) {
    for (const char* name : {"chunks", "logprobs", "prompt_logprobs"}) report[name] = Json::array();
  }
  try {
    if (action.contains("status")) return status(client);
    if (action.contains("resume")) {
      const Json& resume = action.at("resume");
      read(client, client.resume(resume.at("generation_id"), resume.at("received_tokens")), action,
           report);
    } else {
      const Json& asked = action.at("generate");
      read(client, generator.generate(prompt_of(asked.at("prompt")), options_of(asked)), action,
           report);
    }
  } catch (const millrace::MillraceError& error) {
    report["ended"] = "error";
    report["error"] = to_json(error);
  }
  return report;
}

Json act_at_once(millrace::Client& client, const Json& actions) {
  millrace::Session session = client.session();
  std::vector<std::future<Json>> running;
  for (const Json& action : actions) {
    running.push_back(std::async(
        std::launch::async, [&client, &session, &action] { return act(client, session, action); }));
  }
  Json results = Json::array();
  for (std::future<Json>& one : running) results.push_back(one.get());
  return results;
}

Json run(const Json& task) {
  const Json& asked = task.at("options");
  millrace::ClientOptions options;
  options.runtime = task.at("address");
  set(asked, "api_key", options.api_key);
  set(asked, "tls_ca", options.tls_ca);
  set(asked, "tls_cert", options.tls_cert);
  set(asked, "tls_key", options.tls_key);
  set(asked, "max_attempts", options.retries.max_attempts);
  millrace::Client client(options);
  Json results = Json::array();
  for (const Json& action : task.at("do")) {
    if (action.contains("session")) {
      for (Json& result : act_at_once(client, action.at("session")))
        results.push_back(std::move(result));
    } else {
      results.push_back(act(client, client, action));
    }
  }
  return results;
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << Json{{"results", run(Json::parse(line))}}.dump() << std::endl;
  }
}
