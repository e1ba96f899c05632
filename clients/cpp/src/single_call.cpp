#include "single_call.h"

#include <utility>

#include "call_errors.h"

namespace millrace {

SingleCall::SingleCall(std::shared_ptr<const Runtime> runtime,
                       runtime::v1::GenerateStreamRequest request,
                       std::optional<std::chrono::milliseconds> timeout)
    : runtime_(std::move(runtime)), request_(std::move(request)) {
  runtime_->prepare(context_, timeout);
}

SingleCall::~SingleCall() {
  if (reader_ == nullptr) return;
  context_.TryCancel();
  reader_->Finish();
}

void SingleCall::start() { reader_ = runtime_->stub().GenerateStream(&context_, request_); }

bool SingleCall::read(Events& events) {
  runtime::v1::GenerateStreamResponse response;
  if (reader_->Read(&response)) {
    events.Swap(response.mutable_events());
    return true;
  }
  const grpc::Status ended = reader_->Finish();
  reader_.reset();
  if (!ended.ok()) throw from_call(ended, runtime_->address());
  return false;
}

void SingleCall::cancel() { context_.TryCancel(); }

}  // namespace millrace
