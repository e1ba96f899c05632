package millrace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Reasons that the client itself gives; docs/API.md lists those of daemons.
const (
	// ReasonUnreachable: no daemon answered, or the connection was lost.
	ReasonUnreachable = "UNREACHABLE"
	// ReasonCallEnded: the call ended before its generation.
	ReasonCallEnded = "CALL_ENDED"
)

// Error is what a call, a build or a generation failed with; errors.As finds it in every error of
// this package that a daemon or the network caused.
//
// It is a gRPC status too: status.Code and status.FromError understand it. An error of a context
// that has ended satisfies errors.Is with context.Canceled or context.DeadlineExceeded.
type Error struct {
	// Message is one sentence for people: what is wrong, what was found, what to do.
	Message string
	// Reason is for programs, such as PROMPT_TOO_LONG; the name of the code where a status carried
	// no reason.
	Reason string
	// Code is the gRPC status code.
	Code codes.Code
	// Metadata has the values that the message speaks of.
	Metadata map[string]string
	// RetryAfter is set where trying again can help: wait this long first.
	RetryAfter *time.Duration

	status *status.Status
}

// Error gives the message.
func (e *Error) Error() string { return e.Message }

// GRPCStatus gives the status with all of its details, such as BadRequest.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// Is claims that target is the context error of the same meaning.
func (e *Error) Is(target error) bool {
	return target == context.Canceled && e.Code == codes.Canceled ||
		target == context.DeadlineExceeded && e.Code == codes.DeadlineExceeded
}

func fromStatus(said *status.Status) *Error {
	name := code.Code(said.Code()).String()
	err := &Error{Message: said.Message(), Reason: name, Code: said.Code(), status: said}
	for _, detail := range said.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			err.Reason, err.Metadata = detail.GetReason(), detail.GetMetadata()
		case *errdetails.RetryInfo:
			delay := detail.GetRetryDelay()
			after := time.Duration(delay.GetSeconds())*time.Second + time.Duration(delay.GetNanos())
			err.RetryAfter = &after
		}
	}
	return err
}

// fromEvent gives the error of one generation among others.
func fromEvent(said *statuspb.Status) *Error { return fromStatus(status.FromProto(said)) }

// fromCall gives the error that a call of the daemon at address ended with. What a daemon said has
// details; all else is what became of the call.
func fromCall(raised error, address string) error {
	var known *Error
	if raised == nil || raised == io.EOF || errors.As(raised, &known) {
		return raised
	}
	said := status.Convert(raised)
	if ended := status.FromContextError(raised); ended.Code() != codes.Unknown {
		said = ended // gRPC leaves those of a context as they are in some places
	}
	if len(said.Proto().GetDetails()) > 0 {
		return fromStatus(said)
	}
	err := fromStatus(said)
	err.Metadata = map[string]string{"address": address}
	switch said.Code() {
	case codes.Unavailable:
		err.Reason = ReasonUnreachable
		err.Message = fmt.Sprintf("No daemon answers at %s: %s", address, said.Message())
		err.Metadata["details"] = said.Message()
	case codes.DeadlineExceeded:
		err.Message = fmt.Sprintf("The daemon at %s did not answer in time.", address)
	}
	return err
}

// invalidField is the error of an option that cannot be sent, in the daemons' own form.
func invalidField(name, problem string) *Error {
	err := fromStatus(status.New(codes.InvalidArgument, fmt.Sprintf("%s: %s.", name, problem)))
	err.Reason, err.Metadata = "INVALID_FIELD", map[string]string{"field": name}
	return err
}

// callEnded is the error of a daemon that ended a call before its generations had ended.
func callEnded(address string) *Error {
	message := fmt.Sprintf("The daemon at %s ended the call.", address)
	err := fromStatus(status.New(codes.Unavailable, message))
	err.Reason = ReasonCallEnded
	return err
}

// fromContext is the error of a context that has ended.
func fromContext(ended error) *Error { return fromStatus(status.FromContextError(ended)) }

// isLostCall claims that a call broke, and that its generations may go on elsewhere.
func isLostCall(err *Error) bool {
	return err.Reason == ReasonUnreachable || err.Reason == ReasonCallEnded
}
