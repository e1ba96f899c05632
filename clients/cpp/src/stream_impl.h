// How a stream reads its generation: call after call, until one brings the end.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "attempts.h"
#include "call.h"
#include "collector.h"
#include "millrace/stream.h"

namespace millrace {

class Stream::Impl {
 public:
  /// Opens the first call.
  /// @param address of the daemon, for messages.
  Impl(OpenCall open_call, pb::GenerateStreamRequest command, std::string address, Retries retries);
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::optional<Chunk> next();
  void close();
  const Collector& collector() const noexcept { return collector_; }
  const Attempts& attempts() const noexcept { return attempts_; }

 private:
  void open();
  std::optional<Chunk> next_of_call();
  bool is_closed_within(std::chrono::milliseconds time);
  bool is_closed();

  OpenCall open_call_;
  std::string address_;
  Collector collector_;
  Attempts attempts_;
  bool has_ended_ = false;
  // Of the last message, and how many of them were taken.
  Events events_;
  int num_taken_ = 0;

  std::mutex mutex_;
  std::condition_variable closed_;
  bool is_closed_ = false;
  std::shared_ptr<Call> call_;  // replaced by the reader alone, which therefore reads it freely
};

}  // namespace millrace
