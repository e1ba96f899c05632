// Many generations on one call.
#pragma once

#include <memory>

#include "millrace/generation.h"
#include "millrace/stream.h"

namespace millrace {

/// Many generations on one call: the daemon sends one message a step for all of them. Its end of
/// life cancels what still runs. Any thread may use it.
///
/// Where the call breaks, another one takes its place, and each stream goes on there, or fails, by
/// itself. A stream that is not read waits, 1,024 tokens or so ahead of its reader.
class Session {
 public:
  class Impl;

  explicit Session(std::shared_ptr<Impl> impl);
  Session(Session&&) noexcept;
  Session& operator=(Session&&) = delete;
  ~Session();

  /// As `Client::generate`, on this session's call; the daemon alone keeps `timeout`.
  Stream generate(const Prompt& prompt, const GenerateOptions& options = {});

  /// Ends the call; streams that still run fail with `CANCELLED`.
  void close();

 private:
  std::shared_ptr<Impl> impl_;  // its streams hold on to it
};

}  // namespace millrace
