// What a session and its streams share: the call that new generations go to.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "connection.h"
#include "millrace/session.h"

namespace millrace {

class Session::Impl {
 public:
  Impl(std::shared_ptr<const Runtime> runtime, Retries retries);

  const Runtime& runtime() const noexcept { return *runtime_; }
  const Retries& retries() const noexcept { return retries_; }

  /// A call of one generation, on the connection that is open now.
  std::shared_ptr<Call> call(const runtime::v1::GenerateStreamRequest& request);

  void close();

 private:
  std::shared_ptr<const Runtime> runtime_;
  Retries retries_;

  std::mutex mutex_;
  std::shared_ptr<Connection> connection_;
  std::uint64_t next_id_ = 1;
  bool is_closed_ = false;
};

}  // namespace millrace
