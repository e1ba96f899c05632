// What a session's reader hands to one stream.
#pragma once

#include <condition_variable>
#include <mutex>
#include <optional>

#include "call.h"
#include "millrace/errors.h"

namespace millrace {

/// A queue with one reader and no limit.
class EventQueue {
 public:
  /// Adds an event; nothing is added to a queue that has ended.
  void push(runtime::v1::Event event);

  /// Ends it: its reader gets what was pushed, and then this failure if there is one.
  void end(std::optional<MillraceError> failure = std::nullopt);

  /// Waits for events, which take the place of `events`; false at the end.
  /// @throws MillraceError it has ended with this failure.
  bool take(Events& events);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  Events events_;
  bool has_ended_ = false;
  std::optional<MillraceError> failure_;
};

}  // namespace millrace
