package millrace

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	runtimev1 "millrace.io/millrace/gen/millrace/runtime/v1"
)

// authority signs certificates for loopback; its files are in folder.
type authority struct {
	folder      string
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	ca := authority{folder: t.TempDir()}
	ca.certificate, ca.key = ca.issue(t, "ca")
	return ca
}

func (ca authority) path(name string) string { return filepath.Join(ca.folder, name) }

// issue writes name.crt and name.key, signed by the authority if it has a certificate itself.
func (ca authority) issue(t *testing.T, name string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  ca.certificate == nil,
		BasicConstraintsValid: true,
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{
			x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth,
		},
	}
	parent, parentKey := ca.certificate, ca.key
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name + ".crt": {Type: "CERTIFICATE", Bytes: der},
		name + ".key": {Type: "EC PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(ca.path(file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate, key
}

func TestDaemonThatAsksForAClientCertificateAnswersWhoHasOne(t *testing.T) {
	ca := newAuthority(t)
	ca.issue(t, "server")
	ca.issue(t, "client")
	own, err := tls.LoadX509KeyPair(ca.path("server.crt"), ca.path("server.key"))
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{
		Certificates: []tls.Certificate{own},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    x509.NewCertPool(),
	}
	config.ClientCAs.AddCert(ca.certificate)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	runtimev1.RegisterRuntimeServiceServer(server, &endless{})
	go server.Serve(listener)
	defer server.Stop()

	certificate := WithClientCertificate(ca.path("client.crt"), ca.path("client.key"))
	for wanted, options := range map[string][]Option{
		"UNIMPLEMENTED":   {WithTLS(ca.path("ca.crt")), certificate}, // it answers
		ReasonUnreachable: {WithTLS(ca.path("ca.crt"))},
	} {
		options = append(options, WithRetries(Retries{MaxAttempts: 1}))
		client, err := NewClient(listener.Addr().String(), options...)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		_, err = client.Status(context.Background())
		var failed *Error
		if !errors.As(err, &failed) || failed.Reason != wanted {
			t.Errorf("%v, not %s", err, wanted)
		}
	}
}
