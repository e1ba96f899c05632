// Package millrace streams what Millrace's engines generate, from a runtime daemon or a gateway.
//
//	client, err := millrace.NewClient("127.0.0.1:7602")
//	...
//	stream := client.Generate(ctx, millrace.Text("Once upon a time"), millrace.WithMaxNewTokens(64))
//	defer stream.Close()
//	for stream.Next() {
//		fmt.Print(stream.Chunk().Text)
//	}
//	return stream.Err()
//
// What fails is an *Error. The end of a context cancels what was started with it.
package millrace

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"

	compilerv1 "millrace.io/millrace/gen/millrace/compiler/v1"
	runtimev1 "millrace.io/millrace/gen/millrace/runtime/v1"
)

const (
	maxMessageBytes = 64 << 20
	// Of a stream and of a connection; gRPC's own guess may grow to 16 MiB for a reader that is slow.
	windowBytes = 1 << 20
)

// Client speaks to a runtime daemon or a gateway, and to a compile daemon; it connects when it is
// used. Any goroutine may use it.
type Client struct {
	address         string
	retries         Retries
	runtimeChannel  *grpc.ClientConn
	compilerChannel *grpc.ClientConn
	runtime         runtimev1.RuntimeServiceClient
	compiler        compilerv1.CompilerServiceClient
}

// NewClient gives a client of the runtime daemon or gateway at address, host:port.
//
// It fails where a file cannot be used, or where an API key would cross a network in plaintext;
// nobody is spoken to yet.
func NewClient(address string, options ...Option) (*Client, error) {
	settings := settings{compiler: DefaultCompiler}
	for _, option := range options {
		option(&settings)
	}
	settings.retries = settings.retries.withDefaults()
	runtimeChannel, err := settings.dial(address)
	if err != nil {
		return nil, err
	}
	compilerChannel, err := settings.dial(settings.compiler)
	if err != nil {
		runtimeChannel.Close()
		return nil, err
	}
	return &Client{
		address: address, retries: settings.retries,
		runtimeChannel: runtimeChannel, compilerChannel: compilerChannel,
		runtime:  runtimev1.NewRuntimeServiceClient(runtimeChannel),
		compiler: compilerv1.NewCompilerServiceClient(compilerChannel),
	}, nil
}

// Close closes the connections; what streams still run ends.
func (c *Client) Close() error {
	err := c.runtimeChannel.Close()
	if other := c.compilerChannel.Close(); err == nil {
		err = other
	}
	return err
}

// Generate gives a generation as a stream, which starts when it is read. The end of ctx, or
// Stream.Close, cancels what still runs.
func (c *Client) Generate(ctx context.Context, prompt Prompt, options ...GenerateOption) *Stream {
	command, err := startGeneration(prompt, options)
	return newStream(ctx, c.open, command, c.address, c.retries).refuse(err)
}

// Resume goes on with a generation of a gateway whose reader is gone, such as another process, after
// the tokens that its reader had of each sample: Stream.GenerationID and Stream.ReceivedTokens. A
// stream that loses its connection does so by itself.
func (c *Client) Resume(ctx context.Context, generationID string, receivedTokens []int32) *Stream {
	command := resumeGeneration(generationID, receivedTokens)
	return newStream(ctx, c.open, command, c.address, c.retries)
}

// Session is for many generations on one call; the end of ctx ends it as Close does.
func (c *Client) Session(ctx context.Context) *Session {
	ctx, cancel := context.WithCancel(ctx)
	return &Session{
		ctx: ctx, cancel: cancel, runtime: c.runtime, address: c.address, retries: c.retries,
	}
}

// Status is what the runtime daemon serves, its limits and its load.
func (c *Client) Status(ctx context.Context) (*runtimev1.GetStatusResponse, error) {
	return c.runtime.GetStatus(ctx, &runtimev1.GetStatusRequest{})
}

// Runtime is the runtime daemon's service as generated, to load engines; its errors are this
// package's, and unary calls that fail are retried.
func (c *Client) Runtime() runtimev1.RuntimeServiceClient { return c.runtime }

// Compiler is the compile daemon's service as generated, for builds and engines; as Runtime.
func (c *Client) Compiler() compilerv1.CompilerServiceClient { return c.compiler }

func (c *Client) open(
	ctx context.Context, command *runtimev1.GenerateStreamRequest,
) (call, error) {
	stream, err := c.runtime.GenerateStream(ctx, command)
	return ownCall{stream}, err
}

// ownCall is one generation on a call of its own.
type ownCall struct {
	stream runtimev1.RuntimeService_GenerateStreamClient
}

func (c ownCall) recv() ([]*runtimev1.Event, error) {
	response, err := c.stream.Recv()
	return response.GetEvents(), err
}

func (s *settings) dial(address string) (*grpc.ClientConn, error) {
	options, err := s.security(address)
	if err != nil {
		return nil, err
	}
	calls := interceptor{address: address, retries: s.retries}
	options = append(options,
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes),
		),
		grpc.WithInitialWindowSize(windowBytes),
		grpc.WithInitialConnWindowSize(windowBytes),
		grpc.WithKeepaliveParams(
			keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 20 * time.Second},
		),
		// A daemon that restarts is found again quickly.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second,
			},
			MinConnectTimeout: 20 * time.Second,
		}),
		grpc.WithChainUnaryInterceptor(calls.unary),
		grpc.WithChainStreamInterceptor(calls.stream),
	)
	// Dial and not NewClient, which versions before 1.63 lack.
	channel, err := grpc.Dial(address, append(options, s.dialOptions...)...)
	if err != nil {
		return nil, fmt.Errorf("millrace: cannot dial %s: %w", address, err)
	}
	return channel, nil
}
