// A session's call, and who reads what of it.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>

#include "event_queue.h"
#include "runtime.h"

namespace millrace {

/// One call that many generations share. Its thread opens the call, and hands out what arrives; its
/// destructor cancels what still runs.
class Connection {
 public:
  explicit Connection(std::shared_ptr<const Runtime> runtime);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  /// Sends the request of a generation, whose events go to `events` from now on.
  void open(const std::string& request_id, const runtime::v1::GenerateRequest& request,
            std::shared_ptr<EventQueue> events);

  /// Ends that generation; a no-op where it has ended.
  void cancel(const std::string& request_id);

  /// Has the daemon send so many tokens more of that generation.
  void credit(const std::string& request_id, int tokens);

  /// Ends the call, and with it what runs on it.
  void close();

  /// Claims that the call has ended, and that another one is to take its place.
  bool has_ended();

 private:
  void run();
  void hand_out(runtime::v1::Event event);
  void end(const MillraceError& failure);
  void send(const runtime::v1::GenerateRequest& request);

  std::shared_ptr<const Runtime> runtime_;
  grpc::ClientContext context_;

  std::mutex mutex_;  // of the streams' queues
  std::unordered_map<std::string, std::shared_ptr<EventQueue>> queues_;
  std::optional<MillraceError> failure_;

  std::mutex write_mutex_;  // gRPC takes one message of a call at a time
  std::condition_variable opened_;
  std::unique_ptr<
      grpc::ClientReaderWriter<runtime::v1::GenerateRequest, runtime::v1::GenerateResponse>>
      call_;
  bool is_finished_ = false;

  std::thread reader_;
};

}  // namespace millrace
