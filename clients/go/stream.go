package millrace

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	runtimev1 "millrace.io/millrace/gen/millrace/runtime/v1"
)

// call gives the events of one generation as they arrive; io.EOF after the last ones.
type call interface {
	recv() ([]*runtimev1.Event, error)
}

// openCall sends a command, which its callee owns; the end of ctx ends the generation.
type openCall func(ctx context.Context, command *runtimev1.GenerateStreamRequest) (call, error)

// Stream is one generation, read chunk by chunk:
//
//	for stream.Next() {
//		fmt.Print(stream.Chunk().Text)
//	}
//	if err := stream.Err(); err != nil {
//
// Close, or the end of its context, cancels what still runs. It starts with the first Next. A start
// that the daemon refuses with a retry delay is tried again as long as nothing arrived; a connection
// to a gateway that is lost later is made anew, and the generation goes on where it was.
//
// One goroutine reads a stream; any may close it.
type Stream struct {
	ctx       context.Context
	cancel    context.CancelFunc
	openCall  openCall
	address   string
	collector *collector
	attempts  attempts
	isClosed  atomic.Bool

	call       call
	cancelCall context.CancelFunc
	events     []*runtimev1.Event
	chunk      Chunk
	hasEnded   bool
	err        error
}

func newStream(
	ctx context.Context,
	open openCall,
	command *runtimev1.GenerateStreamRequest,
	address string,
	retries Retries,
) *Stream {
	ctx, cancel := context.WithCancel(ctx)
	collector := newCollector(command.GetResume())
	return &Stream{
		ctx: ctx, cancel: cancel, openCall: open, address: address, collector: collector,
		attempts: attempts{command: command, collector: collector, retries: retries, now: time.Now},
	}
}

// refuse ends a stream whose generation cannot be asked for; err is nil where it can.
func (s *Stream) refuse(err error) *Stream {
	if err != nil {
		s.end(err)
	}
	return s
}

// Next waits for the next chunk, which Chunk then gives; false at the end, which Err explains.
func (s *Stream) Next() bool {
	for !s.hasEnded {
		chunk, err := s.read()
		if err != nil {
			s.fail(err)
		} else if chunk != nil {
			s.chunk = *chunk
			return true
		}
	}
	return false
}

// Chunk is what the last Next brought.
func (s *Stream) Chunk() Chunk { return s.chunk }

// Err is what the generation failed with, an *Error; nil before its end, where it finished, and
// where Close ended it.
func (s *Stream) Err() error { return s.err }

// Result is the finished generation; nil until Next has said that it ended, and where it failed.
func (s *Stream) Result() *Generation {
	if !s.hasEnded {
		return nil
	}
	return s.collector.result
}

// Wait reads what is left, and gives the finished generation.
func (s *Stream) Wait() (*Generation, error) {
	for s.Next() {
	}
	if s.err == nil && s.collector.result == nil {
		return nil, fromContext(context.Canceled) // closed before its end
	}
	return s.collector.result, s.err
}

// Close cancels what still runs; it does nothing on a stream that has ended, and never fails.
func (s *Stream) Close() error {
	s.isClosed.Store(true)
	s.cancel()
	return nil
}

// GenerationID names it for Client.Resume; "" before it has started, and where that cannot be.
func (s *Stream) GenerationID() string { return s.collector.generationID }

// ReceivedTokens counts the tokens that have arrived, by sample.
func (s *Stream) ReceivedTokens() []int32 {
	return append([]int32(nil), s.collector.receivedTokens...)
}

// NumResumes is how often its connection was lost and it went on over another one.
func (s *Stream) NumResumes() int { return s.attempts.numResumes }

// read goes one event on; nil where that brings no chunk.
func (s *Stream) read() (*Chunk, error) {
	if s.isClosed.Load() {
		return nil, fromContext(context.Canceled)
	}
	if s.call == nil {
		return nil, s.open()
	}
	if len(s.events) == 0 {
		var err error
		s.events, err = s.call.recv()
		return nil, err
	}
	event := s.events[0]
	s.events = s.events[1:]
	return s.collector.take(event)
}

func (s *Stream) open() error {
	if err := s.ctx.Err(); err != nil {
		return fromContext(err)
	}
	request := s.attempts.open(s.ctx)
	var ctx context.Context
	if deadline := s.attempts.deadline; deadline.IsZero() {
		ctx, s.cancelCall = context.WithCancel(s.ctx)
	} else {
		ctx, s.cancelCall = context.WithDeadline(s.ctx, deadline)
	}
	call, err := s.openCall(ctx, request)
	if err == nil {
		s.call = call
	}
	return err
}

// fail ends the stream, or waits until its next call is due.
func (s *Stream) fail(err error) {
	if s.cancelCall != nil {
		s.cancelCall()
	}
	s.call, s.events = nil, nil
	if s.collector.result != nil || s.isClosed.Load() {
		s.end(nil) // a generation may have ended before its call broke
		return
	}
	if err == io.EOF {
		err = callEnded(s.address)
	}
	var failed *Error
	var delay time.Duration
	again := errors.As(err, &failed)
	if again {
		delay, again = s.attempts.delay(failed)
	}
	if !again {
		s.end(err)
		return
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.ctx.Done():
		if s.isClosed.Load() {
			s.end(nil)
		} else {
			s.end(fromContext(s.ctx.Err()))
		}
	}
}

func (s *Stream) end(err error) {
	s.hasEnded, s.err = true, err
	s.cancel()
}
