package millrace

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
)

// interceptor gives every call of a connection this package's errors, and unary ones their retries:
// all of the services' unary calls are safe to make twice.
type interceptor struct {
	address string
	retries Retries
}

func (i interceptor) unary(
	ctx context.Context, method string, request, response interface{}, channel *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	for attempt := 1; ; attempt++ {
		err := fromCall(invoke(ctx, method, request, response, channel, options...), i.address)
		var failed *Error
		if !errors.As(err, &failed) {
			return err
		}
		delay, again := i.retries.delay(failed, attempt)
		if deadline, has := ctx.Deadline(); !again || has && time.Now().Add(delay).After(deadline) {
			return err
		}
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fromContext(ctx.Err())
		}
	}
}

func (i interceptor) stream(
	ctx context.Context, description *grpc.StreamDesc, channel *grpc.ClientConn, method string,
	open grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := open(ctx, description, channel, method, options...)
	if err != nil {
		return nil, fromCall(err, i.address)
	}
	return typedStream{stream, i.address}, nil
}

// typedStream is a stream whose errors are this package's.
type typedStream struct {
	grpc.ClientStream
	address string
}

func (s typedStream) SendMsg(message interface{}) error {
	return fromCall(s.ClientStream.SendMsg(message), s.address)
}

func (s typedStream) RecvMsg(message interface{}) error {
	return fromCall(s.ClientStream.RecvMsg(message), s.address)
}
