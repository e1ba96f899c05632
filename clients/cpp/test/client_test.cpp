// What the conformance suite cannot ask for: wrong uses, other threads, and times that pass.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <grpcpp/server_builder.h>
#include <millrace/client.h>

#include <future>
#include <memory>
#include <optional>
#include <string>

#include "attempts.h"
#include "call_errors.h"
#include "commands.h"
#include "millrace/runtime/v1/runtime.grpc.pb.h"

namespace {

using millrace::Client;
using millrace::ClientOptions;
using millrace::MillraceError;
using millrace::Session;
using millrace::Stream;
using namespace std::chrono_literals;
namespace pb = millrace::runtime::v1;

// Set once, by one thread; waited for by another, but not for ever.
class Flag {
 public:
  void set() { promise_.set_value(); }
  bool is_set_soon() { return promise_.get_future().wait_for(20s) == std::future_status::ready; }

 private:
  std::promise<void> promise_;
};

struct Seen {
  Flag asked;
  Flag cancelled;
};

pb::Event first_token(const std::string& request_id) {
  pb::Event event;
  event.set_request_id(request_id);
  event.mutable_tokens()->add_token_ids(0);
  event.mutable_tokens()->set_text("Once");
  return event;
}

class SingleReactor final : public grpc::ServerWriteReactor<pb::GenerateStreamResponse> {
 public:
  explicit SingleReactor(Seen& seen) : seen_(seen) {
    *response_.add_events() = first_token("");
    StartWrite(&response_);
    seen_.asked.set();
  }
  void OnCancel() override {
    seen_.cancelled.set();
    Finish(grpc::Status::CANCELLED);
  }
  void OnDone() override { delete this; }

 private:
  Seen& seen_;
  pb::GenerateStreamResponse response_;
};

class SharedReactor final
    : public grpc::ServerBidiReactor<pb::GenerateRequest, pb::GenerateResponse> {
 public:
  explicit SharedReactor(Seen& seen) : seen_(seen) { StartRead(&request_); }
  void OnReadDone(bool is_read) override {
    if (!is_read) return;
    if (request_.has_cancel()) {
      seen_.cancelled.set();
    } else {
      *response_.add_events() = first_token(request_.start().request_id());
      StartWrite(&response_);
    }
    StartRead(&request_);
  }
  void OnCancel() override { Finish(grpc::Status::CANCELLED); }
  void OnDone() override { delete this; }

 private:
  Seen& seen_;
  pb::GenerateRequest request_;
  pb::GenerateResponse response_;
};

// Sends the first token of what is asked, once a call, and then nothing until it is cancelled.
class SilentRuntime final : public pb::RuntimeService::CallbackService {
 public:
  SilentRuntime() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~SilentRuntime() override { server_->Shutdown(std::chrono::system_clock::now()); }

  grpc::ServerWriteReactor<pb::GenerateStreamResponse>* GenerateStream(
      grpc::CallbackServerContext*, const pb::GenerateStreamRequest*) override {
    return new SingleReactor(seen);
  }
  grpc::ServerBidiReactor<pb::GenerateRequest, pb::GenerateResponse>* Generate(
      grpc::CallbackServerContext*) override {
    return new SharedReactor(seen);
  }

  Client client() const {
    ClientOptions options;
    options.runtime = "127.0.0.1:" + std::to_string(port_);
    return Client(options);
  }

  Seen seen;

 private:
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

// Of a port where nobody listens.
ClientOptions nobody() {
  ClientOptions options;
  options.runtime = "127.0.0.1:1";
  return options;
}

bool ends_when_another_thread_closes_it(Stream& stream) {
  auto reader = std::async(std::launch::async, [&stream] { return stream.next(); });
  stream.close();
  return !reader.get().has_value();
}

std::string reason_of_next(Stream& stream) {
  try {
    stream.next();
  } catch (const MillraceError& error) {
    return error.reason();
  }
  return "";
}

// The attempts of a generation that may take `timeout`, by a clock that stands until it is moved.
struct Tried {
  explicit Tried(std::optional<std::chrono::milliseconds> timeout)
      : attempts(command(timeout), collector, {3, 100ms, 10s}, [this] { return now; }) {}

  static pb::GenerateStreamRequest command(std::optional<std::chrono::milliseconds> timeout) {
    millrace::GenerateOptions options;
    options.timeout = timeout;
    return millrace::start_generation("hello", options);
  }

  millrace::Attempts::Clock::time_point now{};
  millrace::Collector collector;
  millrace::Attempts attempts;
};

const MillraceError kLost("lost", "UNREACHABLE", grpc::StatusCode::UNAVAILABLE);

}  // namespace

TEST_CASE("a key does not cross a network in plaintext") {
  ClientOptions options;
  options.runtime = "runtime:7602";
  options.api_key = "mr_x";
  CHECK_THROWS_WITH_AS(Client{options},
                       "an API key is sent to runtime:7602 over TLS alone: give tls_ca",
                       std::invalid_argument);
}

TEST_CASE("half of a certificate is refused") {
  ClientOptions options;
  options.tls_ca = "ca.crt";
  options.tls_cert = "client.crt";
  CHECK_THROWS_WITH_AS(Client{options}, "tls_cert and tls_key go together, and with tls_ca",
                       std::invalid_argument);
}

TEST_CASE("a file that is no certificate is refused") {
  for (const char* path : {"/nowhere/ca.crt", __FILE__}) {
    ClientOptions options;
    options.tls_ca = path;
    CHECK_THROWS_AS(Client{options}, std::invalid_argument);
  }
}

TEST_CASE("text is UTF-8") {
  for (const char* text : {"", "Gr\u00fc\u00df dich \u2603 \U0001D11E", "\u0080\u07FF\u0800\uFFFF",
                           "\uD7FF\uE000", "\U00010000\U0010FFFF"}) {
    CHECK(millrace::start_generation(text, {}).start().text() == text);
  }
  for (const char* text :
       {"caf\xE9", "\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF",
        "\xF4\x90\x80\x80", "\xF8\x88\x80\x80\x80", "\xE2\x98", "\xE2\x28\x83"}) {
    CHECK_THROWS_AS(millrace::start_generation(text, {}), std::invalid_argument);
  }
}

TEST_CASE("template arguments need messages") {
  millrace::GenerateOptions options;
  options.template_arguments = R"({"depth": 1})";
  const std::vector<millrace::Message> messages = {{"user", "hi"}};
  const auto request = millrace::start_generation(messages, options);
  CHECK(request.start().chat().template_arguments() == options.template_arguments);
  CHECK_THROWS_AS(millrace::start_generation("hello", options), std::invalid_argument);
  CHECK_THROWS_AS(millrace::start_generation(std::vector<std::uint32_t>{1}, options),
                  std::invalid_argument);
}

TEST_CASE("a stream starts before it is read") {
  SilentRuntime runtime;
  Client client = runtime.client();
  const Stream stream = client.generate("hello");
  CHECK(runtime.seen.asked.is_set_soon());
}

TEST_CASE("a stream has no result before it was read") {
  Client client(nobody());
  CHECK_THROWS_AS(client.generate("hello").result(), std::logic_error);
}

TEST_CASE("a connection that TLS prevents is told from one that nobody takes") {
  const auto message = [](const char* details) {
    const grpc::Status ended(grpc::StatusCode::UNAVAILABLE, details);
    return std::string(millrace::from_call(ended, "runtime:7602").what());
  };
  CHECK(message("failed to connect to all addresses; last error: UNKNOWN: Ssl handshake failed: "
                "SSL_ERROR_SSL: error:0A000086:SSL routines::certificate verify failed") ==
        "runtime:7602 cannot be spoken to: its certificate is not signed by the given CA, or has "
        "expired");
  CHECK(message("failed to connect to all addresses; last error: UNAVAILABLE: Socket closed") ==
        "runtime:7602 cannot be spoken to: it ends connections; it may ask for TLS, or a client "
        "certificate of its CA");
  CHECK(message("Socket closed") == "No daemon answers at runtime:7602: Socket closed");
  CHECK(message("failed to connect to all addresses; last error: Connection refused") ==
        "No daemon answers at runtime:7602: failed to connect to all addresses; last error: "
        "Connection refused");
}

TEST_CASE("a failure ends a stream") {
  ClientOptions options = nobody();
  options.retries.max_attempts = 1;
  Client client(options);
  Stream stream = client.generate("hello");
  CHECK(reason_of_next(stream) == "UNREACHABLE");
  CHECK_FALSE(stream.next());
}

TEST_CASE("a stream outlives its client") {
  SilentRuntime runtime;
  Stream stream = runtime.client().generate("hello");
  CHECK(stream.next()->text == "Once");
}

TEST_CASE("another thread ends a stream that waits for the daemon") {
  SilentRuntime runtime;
  Client client = runtime.client();
  Stream stream = client.generate("hello");
  CHECK(stream.next()->text == "Once");
  CHECK(ends_when_another_thread_closes_it(stream));
  CHECK(runtime.seen.cancelled.is_set_soon());
}

TEST_CASE("another thread ends a stream that waits for its next try") {
  ClientOptions options = nobody();
  options.retries = {2, 1h, 2h};
  Client client(options);
  Stream stream = client.generate("hello");
  CHECK(ends_when_another_thread_closes_it(stream));
}

TEST_CASE("another thread ends one stream of a session") {
  SilentRuntime runtime;
  Client client = runtime.client();
  Session session = client.session();
  Stream stream = session.generate("hello");
  CHECK(stream.next()->text == "Once");
  CHECK(ends_when_another_thread_closes_it(stream));
  CHECK(runtime.seen.cancelled.is_set_soon());
}

TEST_CASE("the end of a session ends its streams") {
  SilentRuntime runtime;
  Client client = runtime.client();
  std::optional<Session> session(client.session());
  Stream stream = session->generate("hello");
  CHECK(stream.next()->text == "Once");
  session.reset();
  CHECK(reason_of_next(stream) == "CANCELLED");
}

TEST_CASE("a session that was closed starts nothing") {
  SilentRuntime runtime;
  Client client = runtime.client();
  Session session = client.session();
  session.close();
  Stream stream = session.generate("hello");
  CHECK(reason_of_next(stream) == "CANCELLED");
}

TEST_CASE("no call begins after the deadline, and none is waited for beyond it") {
  Tried tried(1s);
  tried.attempts.open();
  CHECK(tried.attempts.timeout() == 1500ms);
  CHECK(tried.attempts.delay(kLost).value() < 200ms);
  tried.now += 1450ms;
  CHECK_FALSE(tried.attempts.delay(kLost));
}

TEST_CASE("losses that bring events and no token end") {
  Tried tried(std::nullopt);
  pb::Event started;
  started.mutable_started()->set_generation_id("x1");
  for (const bool is_last : {false, false, true}) {
    tried.attempts.open();
    CHECK_FALSE(tried.collector.take(started));
    CHECK(tried.attempts.delay(kLost).has_value() != is_last);
  }
  CHECK(tried.attempts.num_resumes() == 2);
}
