package millrace

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// Where daemons listen by default.
const (
	DefaultCompiler = "127.0.0.1:7601"
	DefaultRuntime  = "127.0.0.1:7602"
	DefaultGateway  = "127.0.0.1:7600"
)

// Option is how a client behaves.
type Option func(*settings)

type settings struct {
	compiler          string
	retries           Retries
	apiKey            string
	tlsCA             string
	tlsCert, tlsKey   string
	hasOwnCertificate bool
	tlsConfig         *tls.Config
	dialOptions       []grpc.DialOption
}

// WithCompiler names the compile daemon, host:port, that Client.Compiler speaks to.
func WithCompiler(address string) Option {
	return func(s *settings) { s.compiler = address }
}

// WithRetries says how patient the client is.
func WithRetries(retries Retries) Option {
	return func(s *settings) { s.retries = retries }
}

// WithAPIKey goes with every call: mr_..., where daemons ask for one.
func WithAPIKey(key string) Option {
	return func(s *settings) { s.apiKey = key }
}

// WithTLS speaks TLS to daemons whose certificates that CA signed (a PEM file). Without it, and
// without WithTLSConfig, the client speaks plaintext.
func WithTLS(caFile string) Option {
	return func(s *settings) { s.tlsCA = caFile }
}

// WithClientCertificate shows the client's own certificate (PEM files), where daemons ask for one;
// with WithTLS.
func WithClientCertificate(certFile, keyFile string) Option {
	return func(s *settings) { s.tlsCert, s.tlsKey, s.hasOwnCertificate = certFile, keyFile, true }
}

// WithTLSConfig speaks TLS as the configuration says, instead of WithTLS and WithClientCertificate:
// &tls.Config{} trusts the system's CAs.
func WithTLSConfig(config *tls.Config) Option {
	return func(s *settings) { s.tlsConfig = config }
}

// WithDialOptions are gRPC's own, such as interceptors for traces.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(s *settings) { s.dialOptions = append(s.dialOptions, options...) }
}

// security gives gRPC's form of TLS and API key.
func (s *settings) security(address string) ([]grpc.DialOption, error) {
	config, err := s.clientTLS()
	if err != nil {
		return nil, err
	}
	var options []grpc.DialOption
	if config != nil {
		options = append(options, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	} else {
		// And not insecure.NewCredentials, which versions before 1.34 lack.
		options = append(options, grpc.WithInsecure())
	}
	if s.apiKey != "" {
		if config == nil && !isLocal(address) {
			return nil, fmt.Errorf(
				"millrace: an API key is sent to %s over TLS alone: use WithTLS", address)
		}
		options = append(options, grpc.WithPerRPCCredentials(bearer(s.apiKey)))
	}
	return options, nil
}

// clientTLS is nil where the client speaks plaintext.
func (s *settings) clientTLS() (*tls.Config, error) {
	if s.tlsConfig != nil {
		if s.tlsCA != "" || s.hasOwnCertificate {
			return nil, errors.New("millrace: WithTLSConfig stands for itself, without files")
		}
		return s.tlsConfig.Clone(), nil
	}
	if s.tlsCA == "" {
		if s.hasOwnCertificate {
			return nil, errors.New("millrace: WithClientCertificate goes with WithTLS")
		}
		return nil, nil
	}
	pem, err := os.ReadFile(s.tlsCA)
	if err != nil {
		return nil, fmt.Errorf("millrace: TLS cannot use the CA: %w", err)
	}
	config := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("millrace: TLS cannot use %s: it has no certificate", s.tlsCA)
	}
	if s.hasOwnCertificate {
		own, err := tls.LoadX509KeyPair(s.tlsCert, s.tlsKey)
		if err != nil {
			return nil, fmt.Errorf("millrace: TLS cannot use %s and %s: %w", s.tlsCert, s.tlsKey, err)
		}
		config.Certificates = []tls.Certificate{own}
	}
	return config, nil
}

// isLocal claims that address is on this machine.
func isLocal(address string) bool {
	for _, prefix := range []string{"127.", "localhost:", "[::1]", "unix:"} {
		if strings.HasPrefix(address, prefix) {
			return true
		}
	}
	return false
}

// bearer is an API key as gRPC's credentials of a call.
type bearer string

func (key bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(key)}, nil
}

// RequireTransportSecurity leaves the check to security, as loopback does without TLS.
func (bearer) RequireTransportSecurity() bool { return false }
