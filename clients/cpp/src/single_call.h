// One generation on a call of its own.
#pragma once

#include <memory>
#include <optional>

#include "call.h"
#include "runtime.h"

namespace millrace {

/// HTTP/2's windows hold the server back where its reader is slow.
class SingleCall final : public Call {
 public:
  SingleCall(std::shared_ptr<const Runtime> runtime, runtime::v1::GenerateStreamRequest request,
             std::optional<std::chrono::milliseconds> timeout);
  ~SingleCall() override;
  SingleCall(const SingleCall&) = delete;
  SingleCall& operator=(const SingleCall&) = delete;

  void start() override;
  bool read(Events& events) override;
  void cancel() override;

 private:
  std::shared_ptr<const Runtime> runtime_;
  runtime::v1::GenerateStreamRequest request_;
  grpc::ClientContext context_;
  // Set while the call runs.
  std::unique_ptr<grpc::ClientReader<runtime::v1::GenerateStreamResponse>> reader_;
};

}  // namespace millrace
