#include "call_errors.h"

#include <google/protobuf/util/time_util.h>
#include <google/rpc/error_details.pb.h>

namespace millrace {
namespace {

constexpr char kUnreachable[] = "UNREACHABLE";
constexpr char kCallEnded[] = "CALL_ENDED";

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
    return MillraceError("No daemon answers at " + address + ": " + details, kUnreachable, code,
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
