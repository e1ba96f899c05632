#include "connection.h"

#include <utility>
#include <vector>

#include "call_errors.h"

namespace millrace {

Connection::Connection(std::shared_ptr<const Runtime> runtime) : runtime_(std::move(runtime)) {
  runtime_->prepare(context_);
  reader_ = std::thread([this] { run(); });
}

Connection::~Connection() {
  close();
  reader_.join();
}

void Connection::open(const std::string& request_id, const runtime::v1::GenerateRequest& request,
                      std::shared_ptr<EventQueue> events) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_) return events->end(failure_);
    queues_.emplace(request_id, std::move(events));
  }
  send(request);
}

void Connection::cancel(const std::string& request_id) {
  {
    const std::lock_guard lock(mutex_);
    if (queues_.erase(request_id) == 0) return;
  }
  runtime::v1::GenerateRequest request;
  request.mutable_cancel()->set_request_id(request_id);
  send(request);
}

void Connection::credit(const std::string& request_id, int tokens) {
  runtime::v1::GenerateRequest request;
  request.mutable_credit()->set_request_id(request_id);
  request.mutable_credit()->set_tokens(tokens);
  send(request);
}

void Connection::close() { context_.TryCancel(); }

bool Connection::has_ended() {
  const std::lock_guard lock(mutex_);
  return failure_.has_value();
}

void Connection::run() {
  {
    auto call = runtime_->stub().Generate(&context_);  // waits for the connection
    const std::lock_guard lock(write_mutex_);
    call_ = std::move(call);
  }
  opened_.notify_all();
  runtime::v1::GenerateResponse response;
  while (call_->Read(&response)) {
    for (runtime::v1::Event& event : *response.mutable_events()) hand_out(std::move(event));
  }
  grpc::Status ended;
  {
    const std::lock_guard lock(write_mutex_);
    ended = call_->Finish();
    is_finished_ = true;
  }
  end(ended.ok() ? call_ended(runtime_->address()) : from_call(ended, runtime_->address()));
}

void Connection::hand_out(runtime::v1::Event event) {
  const bool is_last = event.has_finished() || event.has_error();
  std::shared_ptr<EventQueue> queue;
  {
    const std::lock_guard lock(mutex_);
    const auto found = queues_.find(event.request_id());
    if (found == queues_.end()) return;  // a late event of a generation that its reader left
    queue = found->second;
    if (is_last) queues_.erase(found);
  }
  queue->push(std::move(event));
  if (is_last) queue->end();
}

void Connection::end(const MillraceError& failure) {
  std::unordered_map<std::string, std::shared_ptr<EventQueue>> left;
  {
    const std::lock_guard lock(mutex_);
    failure_ = failure;
    left.swap(queues_);
  }
  for (const auto& [request_id, queue] : left) queue->end(failure);
}

void Connection::send(const runtime::v1::GenerateRequest& request) {
  std::unique_lock lock(write_mutex_);
  opened_.wait(lock, [this] { return call_ != nullptr; });
  // Where the call has ended, the reader tells every stream why.
  if (!is_finished_) call_->Write(request);
}

}  // namespace millrace
