#include "millrace/client.h"

#include <thread>
#include <utility>

#include "call_errors.h"
#include "commands.h"
#include "runtime.h"
#include "session_impl.h"
#include "single_call.h"
#include "stream_impl.h"

namespace millrace {
namespace {

Stream open_stream(const std::shared_ptr<const Runtime>& runtime, pb::GenerateStreamRequest command,
                   const Retries& retries) {
  OpenCall open_call = [runtime](const pb::GenerateStreamRequest& request,
                                 std::optional<std::chrono::milliseconds> timeout) {
    return std::make_shared<SingleCall>(runtime, request, timeout);
  };
  return Stream(std::make_unique<Stream::Impl>(std::move(open_call), std::move(command),
                                               runtime->address(), retries));
}

}  // namespace

Client::Client(ClientOptions options)
    : runtime_(std::make_shared<const Runtime>(options)),
      timeout_(options.timeout),
      retries_(options.retries) {}

Stream Client::generate(const Prompt& prompt, const GenerateOptions& options) {
  return open_stream(runtime_, start_generation(prompt, options), retries_);
}

Stream Client::resume(const std::string& generation_id, const std::vector<int>& received_tokens) {
  return open_stream(runtime_, resume_generation(generation_id, received_tokens), retries_);
}

Session Client::session() { return Session(std::make_shared<Session::Impl>(runtime_, retries_)); }

runtime::v1::GetStatusResponse Client::get_status() {
  for (int attempt = 1;; ++attempt) {
    grpc::ClientContext context;
    runtime_->prepare(context, timeout_);
    pb::GetStatusResponse response;
    const grpc::Status ended = runtime_->stub().GetStatus(&context, {}, &response);
    if (ended.ok()) return response;
    const MillraceError error = from_call(ended, runtime_->address());
    const std::optional<std::chrono::milliseconds> delay = retries_.delay(error, attempt);
    if (!delay) throw error;
    std::this_thread::sleep_for(*delay);
  }
}

}  // namespace millrace
