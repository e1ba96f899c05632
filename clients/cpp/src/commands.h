// What a client asks, in its wire form.
#pragma once

#include <string>
#include <vector>

#include "millrace/generation.h"
#include "millrace/runtime/v1/runtime.pb.h"

namespace millrace {

namespace pb = runtime::v1;

/// The request that starts a generation.
/// @throws std::invalid_argument a text is not UTF-8, or template arguments have no messages.
pb::GenerateStreamRequest start_generation(const Prompt& prompt, const GenerateOptions& options);

/// The request that goes on with a generation after so many tokens of each sample.
pb::GenerateStreamRequest resume_generation(const std::string& generation_id,
                                            const std::vector<int>& received_tokens);

/// Tokens of a generation that the daemon may send before they are read: what its reader leaves
/// unread is bounded, and holds up no other one of its call.
inline constexpr int kCreditTokens = 1024;

/// The same request, as one of many of a call, with its first credit.
pb::GenerateRequest named(const pb::GenerateStreamRequest& request, const std::string& request_id);

}  // namespace millrace
