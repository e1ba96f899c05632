package dev.millrace;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ChannelCredentials;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptors;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelProvider;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.TlsChannelCredentials;
import io.grpc.stub.MetadataUtils;
import java.io.IOException;
import java.nio.file.Path;
import java.util.concurrent.TimeUnit;
import java.util.regex.Pattern;

/** The connection to one daemon; it connects when it is used, and again where it was lost. */
final class Daemon implements AutoCloseable {
  private static final int MAX_MESSAGE_BYTES = 64 << 20;
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
  private static final Pattern LOCAL = Pattern.compile("(127\\.|localhost:|\\[::1\\]).*");

  private final String address;
  private final ManagedChannel managed;
  private final Channel channel;

  /** How a client proves itself to daemons, and they to it; a path that is null is not given. */
  record Security(String apiKey, Path tlsCa, Path tlsCert, Path tlsKey) {
    Security {
      if ((tlsCert == null) != (tlsKey == null) || (tlsCert != null && tlsCa == null)) {
        throw new IllegalArgumentException("tlsCert and tlsKey go together, and with tlsCa");
      }
    }

    private ChannelCredentials credentials() throws IOException {
      if (tlsCa == null) {
        return InsecureChannelCredentials.create();
      }
      var credentials = TlsChannelCredentials.newBuilder().trustManager(tlsCa.toFile());
      if (tlsCert != null) {
        credentials.keyManager(tlsCert.toFile(), tlsKey.toFile());
      }
      return credentials.build();
    }

    private String files() {
      return tlsCert == null ? tlsCa.toString() : tlsCa + ", " + tlsCert + " and " + tlsKey;
    }
  }

  Daemon(String address, Security security) {
    boolean isLocal = LOCAL.matcher(address).matches();
    if (!security.apiKey().isEmpty() && security.tlsCa() == null && !isLocal) {
      throw new IllegalArgumentException(
          "an API key is sent to " + address + " over TLS alone: give tlsCa");
    }
    this.address = address;
    this.managed = open(address, security);
    Metadata metadata = new Metadata();
    if (!security.apiKey().isEmpty()) {
      metadata.put(AUTHORIZATION, "Bearer " + security.apiKey());
    }
    this.channel =
        ClientInterceptors.intercept(
            managed, MetadataUtils.newAttachHeadersInterceptor(metadata));
  }

  private static ManagedChannel open(String address, Security security) {
    try {
      return Grpc.newChannelBuilder(address, security.credentials())
          .maxInboundMessageSize(MAX_MESSAGE_BYTES)
          .keepAliveTime(30, TimeUnit.SECONDS)
          .keepAliveTimeout(20, TimeUnit.SECONDS)
          .disableRetry() // `Retries` alone decides
          .build();
    } catch (IOException
        | IllegalArgumentException
        | ManagedChannelProvider.ProviderNotFoundException error) {
      // gRPC finds out in one step that an address, a file, or what stands in it is of no use.
      String with = security.tlsCa() == null ? "" : " with " + security.files();
      throw new IllegalArgumentException(
          "nothing can be connected to " + address + with + ": " + error.getMessage(), error);
    }
  }

  String address() {
    return address;
  }

  /** Where stubs send their calls. */
  Channel channel() {
    return channel;
  }

  <Q, A> ClientCall<Q, A> newCall(MethodDescriptor<Q, A> method, CallOptions options) {
    return channel.newCall(method, options);
  }

  /** What a call ended with, as an exception; {@code CALL_ENDED} where the daemon saw nothing wrong. */
  MillraceException failure(Status status, Metadata trailers) {
    if (managed.isShutdown()) {
      return Errors.cancelled("The client was closed.");
    }
    if (status.isOk()) {
      return Errors.callEnded(address);
    }
    MillraceException error = Errors.fromCall(status, trailers, address);
    if (Errors.isLostCall(error)) {
      // gRPC waits a second and more before it connects again, and refuses calls until then.
      managed.resetConnectBackoff();
    }
    return error;
  }

  /** Ends the connection, and all that runs over it. */
  @Override
  public void close() {
    managed.shutdownNow();
  }
}
