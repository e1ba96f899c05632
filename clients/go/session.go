package millrace

import (
	"context"
	"io"
	"strconv"
	"sync"

	"google.golang.org/protobuf/proto"

	runtimev1 "millrace.io/millrace/gen/millrace/runtime/v1"
)

// creditTokens of a generation may be sent by the daemon before they are read: what its reader
// leaves unread is bounded, and holds up no other one of its call.
const creditTokens = 1024

// Session is many generations on one call: the daemon sends one message a step for all of them.
//
// Where the call breaks, another one takes its place, and each stream goes on there, or fails, by
// itself. A stream that is not read waits, 1,024 tokens or so ahead of its reader. Any goroutine may
// use a session.
type Session struct {
	ctx     context.Context
	cancel  context.CancelFunc
	runtime runtimev1.RuntimeServiceClient
	address string
	retries Retries

	mu         sync.Mutex
	connection *connection
	numStarted uint64
}

// Generate gives a generation on this session's call, as Client.Generate.
func (s *Session) Generate(ctx context.Context, prompt Prompt, options ...GenerateOption) *Stream {
	command, err := startGeneration(prompt, options)
	return newStream(ctx, s.open, command, s.address, s.retries).refuse(err)
}

// Close ends the call, and with it what runs on it; it never fails.
func (s *Session) Close() error {
	s.cancel()
	return nil
}

// open runs a command on the session's call, which is made where there is none, or a lost one.
func (s *Session) open(ctx context.Context, command *runtimev1.GenerateStreamRequest) (call, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.connection == nil || s.connection.hasFailed() {
		s.connection = newConnection()
		go s.connection.dispatch(s.ctx, s.runtime, s.address)
	}
	s.numStarted++
	requestID := strconv.FormatUint(s.numStarted, 10)
	return s.connection.run(ctx, requestID, named(command, requestID))
}

// connection is one call, and who reads what of it.
type connection struct {
	requests *mailbox[*runtimev1.GenerateRequest]

	mu      sync.Mutex
	readers map[string]*sharedCall
	failure error
}

func newConnection() *connection {
	return &connection{
		requests: newMailbox[*runtimev1.GenerateRequest](),
		readers:  map[string]*sharedCall{},
	}
}

func (c *connection) hasFailed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failure != nil
}

// run sends a command; its events arrive until the terminal one, or until ctx ends.
func (c *connection) run(
	ctx context.Context, requestID string, request *runtimev1.GenerateRequest,
) (call, error) {
	shared := &sharedCall{
		events: newMailbox[*runtimev1.Event](),
		ended:  make(chan struct{}),
		credit: func(tokens int) { c.requests.put(addCredit(requestID, tokens)) },
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failure != nil {
		return nil, c.failure
	}
	c.readers[requestID] = shared
	c.requests.put(request)
	go func() {
		select {
		case <-ctx.Done():
			c.leave(requestID, ctx.Err())
		case <-shared.ended:
		}
	}()
	return shared, nil
}

// leave cancels a generation that has not ended; its events are no longer read.
func (c *connection) leave(requestID string, why error) {
	if shared := c.forget(requestID); shared != nil {
		c.requests.put(cancelGeneration(requestID))
		shared.end(fromContext(why))
	}
}

// forget gives who reads that generation, for the last time; nil where nobody does.
func (c *connection) forget(requestID string) *sharedCall {
	c.mu.Lock()
	defer c.mu.Unlock()
	shared := c.readers[requestID]
	delete(c.readers, requestID)
	return shared
}

// dispatch makes the call, and hands out what arrives until it ends.
func (c *connection) dispatch(
	ctx context.Context, runtime runtimev1.RuntimeServiceClient, address string,
) {
	stream, err := runtime.Generate(ctx)
	if err != nil {
		c.fail(err)
		return
	}
	go c.send(stream)
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			err = callEnded(address)
		}
		if err != nil {
			c.fail(err)
			return
		}
		for _, event := range response.GetEvents() {
			c.pass(event)
		}
	}
}

// send writes what there is to send, as gRPC takes one message of a call at a time.
func (c *connection) send(stream runtimev1.RuntimeService_GenerateClient) {
	for {
		requests, err := c.requests.take()
		if err != nil {
			return
		}
		for _, request := range requests {
			if stream.Send(request) != nil {
				return // the call has ended: dispatch tells every stream why
			}
		}
	}
}

// pass hands an event to its reader; late ones of a generation that was left have none.
func (c *connection) pass(event *runtimev1.Event) {
	c.mu.Lock()
	shared := c.readers[event.GetRequestId()]
	c.mu.Unlock()
	if shared == nil {
		return
	}
	shared.events.put(event)
	if event.GetFinished() != nil || event.GetError() != nil {
		if c.forget(event.GetRequestId()) != nil {
			shared.end(io.EOF)
		}
	}
}

func (c *connection) fail(err error) {
	c.mu.Lock()
	readers := c.readers
	c.failure, c.readers = err, nil
	c.mu.Unlock()
	c.requests.end(err)
	for _, shared := range readers {
		shared.end(err)
	}
}

// sharedCall is one generation among others on a call.
type sharedCall struct {
	events  *mailbox[*runtimev1.Event]
	ended   chan struct{}
	credit  func(tokens int)
	numRead int // tokens since the last credit
}

// recv gives what has arrived. That it is called again means that what it gave before was read.
func (s *sharedCall) recv() ([]*runtimev1.Event, error) {
	if s.numRead >= creditTokens/2 {
		s.credit(s.numRead)
		s.numRead = 0
	}
	events, err := s.events.take()
	for _, event := range events {
		s.numRead += len(event.GetTokens().GetTokenIds())
	}
	return events, err
}

// end is called once, by who took it out of the readers.
func (s *sharedCall) end(err error) {
	s.events.end(err)
	close(s.ended)
}

// named gives the command as one of many of a call, with its first credit. It is a copy: an earlier
// one may still be sent.
func named(command *runtimev1.GenerateStreamRequest, requestID string) *runtimev1.GenerateRequest {
	if resume := command.GetResume(); resume != nil {
		resume = proto.Clone(resume).(*runtimev1.ResumeGeneration)
		resume.RequestId, resume.CreditTokens = requestID, proto.Int32(creditTokens)
		return &runtimev1.GenerateRequest{Command: &runtimev1.GenerateRequest_Resume{Resume: resume}}
	}
	start := proto.Clone(command.GetStart()).(*runtimev1.StartGeneration)
	start.RequestId, start.CreditTokens = requestID, proto.Int32(creditTokens)
	return &runtimev1.GenerateRequest{Command: &runtimev1.GenerateRequest_Start{Start: start}}
}

func cancelGeneration(requestID string) *runtimev1.GenerateRequest {
	cancel := &runtimev1.CancelGeneration{RequestId: requestID}
	return &runtimev1.GenerateRequest{Command: &runtimev1.GenerateRequest_Cancel{Cancel: cancel}}
}

func addCredit(requestID string, tokens int) *runtimev1.GenerateRequest {
	credit := &runtimev1.AddCredit{RequestId: requestID, Tokens: int32(tokens)}
	return &runtimev1.GenerateRequest{Command: &runtimev1.GenerateRequest_Credit{Credit: credit}}
}
