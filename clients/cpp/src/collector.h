// What has arrived of one generation.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "millrace/generation.h"
#include "millrace/runtime/v1/runtime.pb.h"

namespace millrace {

namespace pb = runtime::v1;

/// Turns the events of one generation into chunks, and at the end into a `Generation`.
class Collector {
 public:
  /// @param generation_id of one that is resumed; the server names others.
  /// @param received_tokens that the reader had of it before, by sample.
  explicit Collector(std::string generation_id = "", std::vector<int> received_tokens = {});

  /// The chunk that `event` brings, if it is one; nothing follows the end.
  /// @throws MillraceError the generation failed.
  std::optional<Chunk> take(const pb::Event& event);

  const std::string& generation_id() const noexcept { return generation_id_; }
  const std::vector<int>& received_tokens() const noexcept { return received_tokens_; }
  int num_events() const noexcept { return num_events_; }
  bool has_started() const noexcept { return has_started_; }
  const std::optional<Generation>& result() const noexcept { return result_; }

 private:
  Chunk take_tokens(const pb::TokenChunk& tokens);
  Generation finish(const pb::GenerationFinished& finished) const;

  struct Output {
    std::string text;
    std::vector<std::uint32_t> token_ids;
  };

  std::string generation_id_;
  std::vector<int> received_tokens_;
  int num_events_ = 0;
  bool has_started_ = false;
  std::uint64_t seed_ = 0;
  std::vector<Output> outputs_;
  std::optional<Generation> result_;
};

}  // namespace millrace
