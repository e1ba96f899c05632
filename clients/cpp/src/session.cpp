#include "millrace/session.h"

#include <atomic>
#include <string>
#include <utility>

#include "commands.h"
#include "session_impl.h"
#include "stream_impl.h"

namespace millrace {
namespace {

// One generation among others on a session's call.
class SharedCall final : public Call {
 public:
  SharedCall(std::shared_ptr<Connection> connection, std::string request_id,
             runtime::v1::GenerateRequest request)
      : connection_(std::move(connection)),
        request_id_(std::move(request_id)),
        request_(std::move(request)) {}
  ~SharedCall() override { cancel(); }
  SharedCall(const SharedCall&) = delete;
  SharedCall& operator=(const SharedCall&) = delete;

  void start() override {
    connection_->open(request_id_, request_, events_);
    // A `cancel` that came in between found nothing to end.
    if (is_cancelled_) connection_->cancel(request_id_);
  }

  // That it is called again means that what it gave before was read.
  bool read(Events& events) override {
    if (num_read_ >= kCreditTokens / 2) {
      connection_->credit(request_id_, num_read_);
      num_read_ = 0;
    }
    const bool has_events = events_->take(events);
    for (const auto& event : events) num_read_ += event.tokens().token_ids_size();
    return has_events;
  }

  void cancel() override {
    is_cancelled_ = true;
    events_->end();
    connection_->cancel(request_id_);
  }

 private:
  std::shared_ptr<Connection> connection_;
  std::string request_id_;
  runtime::v1::GenerateRequest request_;
  std::shared_ptr<EventQueue> events_ = std::make_shared<EventQueue>();
  std::atomic<bool> is_cancelled_ = false;
  int num_read_ = 0;  // tokens since the last credit
};

}  // namespace

Session::Impl::Impl(std::shared_ptr<const Runtime> runtime, Retries retries)
    : runtime_(std::move(runtime)),
      retries_(retries),
      connection_(std::make_shared<Connection>(runtime_)) {}

std::shared_ptr<Call> Session::Impl::call(const runtime::v1::GenerateStreamRequest& request) {
  const std::lock_guard lock(mutex_);
  if (!is_closed_ && connection_->has_ended()) connection_ = std::make_shared<Connection>(runtime_);
  std::string request_id = std::to_string(next_id_++);
  runtime::v1::GenerateRequest one_of_many = named(request, request_id);
  return std::make_shared<SharedCall>(connection_, std::move(request_id), std::move(one_of_many));
}

void Session::Impl::close() {
  const std::lock_guard lock(mutex_);
  is_closed_ = true;
  connection_->close();
}

Session::Session(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::Session(Session&&) noexcept = default;

Session::~Session() {
  if (impl_ != nullptr) impl_->close();  // otherwise it was moved
}

Stream Session::generate(const Prompt& prompt, const GenerateOptions& options) {
  OpenCall open_call = [shared = impl_](const pb::GenerateStreamRequest& request,
                                        std::optional<std::chrono::milliseconds>) {
    return shared->call(request);
  };
  return Stream(std::make_unique<Stream::Impl>(std::move(open_call),
                                               start_generation(prompt, options),
                                               impl_->runtime().address(), impl_->retries()));
}

void Session::close() { impl_->close(); }

}  // namespace millrace
