#include "runtime.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include <array>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string_view>

namespace millrace {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;

bool is_local(std::string_view address) {
  constexpr std::array<std::string_view, 4> kPrefixes = {"127.", "localhost:", "[::1]", "unix:"};
  for (const std::string_view prefix : kPrefixes) {
    if (address.substr(0, prefix.size()) == prefix) return true;
  }
  return false;
}

// Big messages, dead peers found, no proxy to loopback.
grpc::ChannelArguments channel_arguments(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, is_local(address) ? 0 : 1);
  // A daemon that restarts is found again quickly.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2'000);
  return arguments;
}

// The file's content; gRPC itself would tell about a broken one at every call, as a lost
// connection.
std::string read_pem(const std::string& path) {
  if (path.empty()) return "";
  std::ifstream file(path, std::ios::binary);
  const std::string pem{std::istreambuf_iterator<char>(file), {}};
  if (pem.find("-----BEGIN ") == std::string::npos) {
    throw std::invalid_argument("TLS cannot use " + path + ": it is missing, or not PEM");
  }
  return pem;
}

std::shared_ptr<grpc::ChannelCredentials> credentials(const ClientOptions& options) {
  if (options.tls_cert.empty() != options.tls_key.empty() ||
      (!options.tls_cert.empty() && options.tls_ca.empty())) {
    throw std::invalid_argument("tls_cert and tls_key go together, and with tls_ca");
  }
  if (options.tls_ca.empty()) {
    if (!options.api_key.empty() && !is_local(options.runtime)) {
      throw std::invalid_argument("an API key is sent to " + options.runtime +
                                  " over TLS alone: give tls_ca");
    }
    return grpc::InsecureChannelCredentials();
  }
  grpc::SslCredentialsOptions tls;
  tls.pem_root_certs = read_pem(options.tls_ca);
  tls.pem_private_key = read_pem(options.tls_key);
  tls.pem_cert_chain = read_pem(options.tls_cert);
  return grpc::SslCredentials(tls);
}

}  // namespace

Runtime::Runtime(const ClientOptions& options)
    : address_(options.runtime),
      api_key_(options.api_key),
      stub_(runtime::v1::RuntimeService::NewStub(grpc::CreateCustomChannel(
          options.runtime, credentials(options), channel_arguments(options.runtime)))) {}

void Runtime::prepare(grpc::ClientContext& context,
                      std::optional<std::chrono::milliseconds> timeout) const {
  // Not as call credentials, which gRPC refuses to send over plaintext, even on loopback.
  if (!api_key_.empty()) context.AddMetadata("authorization", "Bearer " + api_key_);
  if (timeout) context.set_deadline(std::chrono::system_clock::now() + *timeout);
}

}  // namespace millrace
