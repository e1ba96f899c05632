#include "call_errors.h"

#include <google/protobuf/util/time_util.h>
#include <google/rpc/error_details.pb.h>

#include <utility>

namespace millrace {
namespace {

constexpr char kUnreachable[] = "UNREACHABLE";
constexpr char kCallEnded[] = "CALL_ENDED";

// Marks in what gRPC, OpenSSL and BoringSSL say of a connection that did not come about, and what
// they mean; the first match counts.
constexpr std::pair<const char*, const char*> kTlsProblems[] = {
    {"certificate verify failed", "its certificate is not signed by the given CA, or has expired"},
    {"CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by the given CA, or has expired"},
    {"Hostname Verification", "its certificate is for another host"},
    {"wrong version number", "it does not speak TLS; leave the CA out"},
    {"WRONG_VERSION_NUMBER", "it does not speak TLS; leave the CA out"},
    {"Socket closed", "it ends connections; it may ask for TLS, or a client certificate of its CA"},
    {"handshake failed", "the TLS handshake failed"},
    {"empty address list", "gRPC cannot use the client's certificate with its key"},
};

std::string unreachable(const std::string& address, const std::string& details) {
  const auto says = [&details](const char* mark) { return details.find(mark) != details.npos; };
  // A connection that is lost later has nothing to do with TLS.
  const bool was_never_there = says("failed to connect") || says("empty address list");
  for (const auto& [mark, problem] : kTlsProblems) {
    if (was_never_there && says(mark)) return address + " cannot be spoken to: " + problem;
  }
  return "No daemon answers at " + address + ": " + details;
}

// UNKNOWN where the number is none of gRPC's.
grpc::StatusCode code_of(int number) {
  return number >= grpc::StatusCode::OK && number <= grpc::StatusCode::UNAUTHENTICATED
             ? static_cast<grpc::StatusCode>(number)
             : grpc::StatusCode::UNKNOWN;
}

}  // namespace

MillraceError from_status(const google::rpc::Status& status) {
  const grpc::StatusCode code = code_of(status.code());
  std::string reason = to_string(code);
  MillraceError::Metadata metadata;
  std::optional<std::chrono::milliseconds> retry_after;
  for (const google::protobuf::Any& packed : status.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::RetryInfo retry;
    if (packed.UnpackTo(&info)) {
      reason = info.reason();
      metadata = {info.metadata().begin(), info.metadata().end()};
    } else if (packed.UnpackTo(&retry)) {
      using google::protobuf::util::TimeUtil;
      retry_after.emplace(TimeUtil::DurationToMilliseconds(retry.retry_delay()));
    }
  }
  return MillraceError(status.message(), reason, code, metadata, retry_after);
}

MillraceError from_call(const grpc::Status& ended, const std::string& address) {
  google::rpc::Status status;
  if (!ended.error_details().empty() && status.ParseFromString(ended.error_details())) {
    return from_status(status);
  }
  const grpc::StatusCode code = ended.error_code();
  const std::string& details = ended.error_message();
  // A proxy's UNAVAILABLE has no details, and is a lost connection as well.
  if (code == grpc::StatusCode::UNAVAILABLE) {
    return MillraceError(unreachable(address, details), kUnreachable, code,
                         {{"address", address}, {"details", details}});
  }
  if (code == grpc::StatusCode::DEADLINE_EXCEEDED) {
    return MillraceError("The daemon at " + address + " did not answer in time.", to_string(code),
                         code, {{"address", address}});
  }
  return MillraceError(details.empty() ? to_string(code) : details, to_string(code), code,
                       {{"address", address}});
}

MillraceError call_ended(const std::string& address) {
  return MillraceError("The daemon at " + address + " ended the call.", kCallEnded,
                       grpc::StatusCode::UNAVAILABLE);
}

bool is_lost_call(const MillraceError& error) {
  return error.reason() == kUnreachable || error.reason() == kCallEnded;
}

}  // namespace millrace
