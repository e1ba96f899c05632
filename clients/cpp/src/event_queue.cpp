#include "event_queue.h"

#include <utility>

namespace millrace {

void EventQueue::push(runtime::v1::Event event) {
  {
    const std::lock_guard lock(mutex_);
    if (has_ended_) return;
    *events_.Add() = std::move(event);
  }
  changed_.notify_one();
}

void EventQueue::end(std::optional<MillraceError> failure) {
  {
    const std::lock_guard lock(mutex_);
    if (has_ended_) return;
    has_ended_ = true;
    failure_ = std::move(failure);
  }
  changed_.notify_one();
}

bool EventQueue::take(Events& events) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return has_ended_ || !events_.empty(); });
  events.Clear();
  events.Swap(&events_);
  if (!events.empty()) return true;
  if (failure_) throw MillraceError(*failure_);
  return false;
}

}  // namespace millrace
