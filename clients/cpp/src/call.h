// Where the events of one generation come from: a call of its own, or one that many share.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>

#include "millrace/runtime/v1/runtime.pb.h"

namespace millrace {

using Events = google::protobuf::RepeatedPtrField<runtime::v1::Event>;

/// One started generation; its destructor cancels what still runs.
class Call {
 public:
  virtual ~Call() = default;

  /// Sends the request; waits for the connection.
  virtual void start() = 0;

  /// Waits for the next events, which take the place of `events`; false: the call has ended well.
  /// @throws MillraceError it has ended otherwise.
  virtual bool read(Events& events) = 0;

  /// Ends the generation, and the reading. Any thread may call it, before `start` too.
  virtual void cancel() = 0;
};

/// Gives the call of a request, which may take so long; nothing: its time.
using OpenCall = std::function<std::shared_ptr<Call>(const runtime::v1::GenerateStreamRequest&,
                                                     std::optional<std::chrono::milliseconds>)>;

}  // namespace millrace
