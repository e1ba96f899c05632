#include "millrace/stream.h"

#include <stdexcept>
#include <utility>

#include "call_errors.h"
#include "stream_impl.h"

namespace millrace {

Stream::Impl::Impl(OpenCall open_call, pb::GenerateStreamRequest command, std::string address,
                   Retries retries)
    : open_call_(std::move(open_call)),
      address_(std::move(address)),
      collector_(command.resume().generation_id(), {command.resume().received_tokens().begin(),
                                                    command.resume().received_tokens().end()}),
      attempts_(std::move(command), collector_, retries) {
  open();
}

Stream::Impl::~Impl() { close(); }

std::optional<Chunk> Stream::Impl::next() {
  while (!has_ended_ && !is_closed()) {
    MillraceError error = call_ended(address_);
    try {
      if (std::optional<Chunk> chunk = next_of_call()) return chunk;
    } catch (const MillraceError& raised) {
      error = raised;
    }
    // A call may break when its generation has ended.
    has_ended_ = collector_.result().has_value();
    if (has_ended_ || is_closed()) break;
    const std::optional<std::chrono::milliseconds> delay = attempts_.delay(error);
    has_ended_ = !delay;
    if (has_ended_) throw error;
    if (!is_closed_within(*delay)) open();
  }
  return std::nullopt;
}

void Stream::Impl::close() {
  std::shared_ptr<Call> call;
  {
    const std::lock_guard lock(mutex_);
    if (is_closed_) return;
    is_closed_ = true;
    call = call_;
  }
  closed_.notify_one();
  call->cancel();
}

void Stream::Impl::open() {
  const pb::GenerateStreamRequest request = attempts_.open();
  std::shared_ptr<Call> call = open_call_(request, attempts_.timeout());
  events_.Clear();
  num_taken_ = 0;
  {
    const std::lock_guard lock(mutex_);
    if (is_closed_) return;
    call_.swap(call);
  }
  call_->start();
}

// Nothing: the call has ended well.
std::optional<Chunk> Stream::Impl::next_of_call() {
  do {
    while (num_taken_ < events_.size()) {
      if (std::optional<Chunk> chunk = collector_.take(events_[num_taken_++])) return chunk;
    }
    num_taken_ = 0;
  } while (call_->read(events_));
  return std::nullopt;
}

bool Stream::Impl::is_closed_within(std::chrono::milliseconds time) {
  std::unique_lock lock(mutex_);
  return closed_.wait_for(lock, time, [this] { return is_closed_; });
}

bool Stream::Impl::is_closed() {
  const std::lock_guard lock(mutex_);
  return is_closed_;
}

Stream::Stream(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Stream::Stream(Stream&&) noexcept = default;
Stream& Stream::operator=(Stream&&) noexcept = default;
Stream::~Stream() = default;

std::optional<Chunk> Stream::next() { return impl_->next(); }

Stream::Iterator Stream::begin() { return Iterator(impl_.get()); }

Stream::Iterator Stream::end() noexcept { return {}; }

Stream::Iterator& Stream::Iterator::operator++() {
  chunk_ = stream_->next();
  return *this;
}

Generation Stream::wait() {
  while (next()) {
  }
  return result();
}

void Stream::close() { impl_->close(); }

const Generation& Stream::result() const {
  const std::optional<Generation>& result = impl_->collector().result();
  if (!result) {
    throw std::logic_error("the generation has not finished: read the stream to its end first");
  }
  return *result;
}

const std::string& Stream::generation_id() const noexcept {
  return impl_->collector().generation_id();
}

const std::vector<int>& Stream::received_tokens() const noexcept {
  return impl_->collector().received_tokens();
}

int Stream::num_resumes() const noexcept { return impl_->attempts().num_resumes(); }

}  // namespace millrace
