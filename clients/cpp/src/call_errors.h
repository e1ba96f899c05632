// The errors that calls end with, decoded from what daemons send: a google.rpc.Status with one
// ErrorInfo, and RetryInfo where trying again can help.
#pragma once

#include <google/rpc/status.pb.h>
#include <grpcpp/support/status.h>

#include <string>

#include "millrace/errors.h"

namespace millrace {

/// The error that `status` says.
MillraceError from_status(const google::rpc::Status& status);

/// The error that a call of the daemon at `address` ended with.
MillraceError from_call(const grpc::Status& ended, const std::string& address);

/// The error of a daemon that ended a call before its generations had ended.
MillraceError call_ended(const std::string& address);

/// Claims that a call broke, and that its generations may go on elsewhere.
bool is_lost_call(const MillraceError& error);

}  // namespace millrace
