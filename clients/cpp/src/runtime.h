// A runtime daemon or a gateway, as calls reach it: address, connection, credentials.
#pragma once

#include <grpcpp/client_context.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "millrace/client.h"
#include "millrace/runtime/v1/runtime.grpc.pb.h"

namespace millrace {

/// Connects when it is used; every call, stream and session holds on to it.
class Runtime {
 public:
  /// @throws std::invalid_argument as `Client`.
  explicit Runtime(const ClientOptions& options);

  const std::string& address() const noexcept { return address_; }
  runtime::v1::RuntimeService::Stub& stub() const noexcept { return *stub_; }

  /// Readies the context of a call, which may take `timeout`; nothing: its time.
  void prepare(grpc::ClientContext& context,
               std::optional<std::chrono::milliseconds> timeout = std::nullopt) const;

 private:
  std::string address_;
  std::string api_key_;
  std::unique_ptr<runtime::v1::RuntimeService::Stub> stub_;
};

}  // namespace millrace
