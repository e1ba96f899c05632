package millrace

import (
	"context"
	"time"

	runtimev1 "millrace.io/millrace/gen/millrace/runtime/v1"
)

// A daemon ends a generation at its timeout and says so; who hears nothing waits this much longer.
const deadlineGrace = 500 * time.Millisecond

// attempts are the calls that one generation takes: its start, and what follows where one fails.
//
// A start of which nothing arrived is sent again, where that can help. Later on the generation is
// resumed, by the id that the server gave it and the tokens that have arrived, so that no token is
// lost and none comes twice. Both end after Retries.MaxAttempts calls in a row without a token.
type attempts struct {
	command   *runtimev1.GenerateStreamRequest
	collector *collector
	retries   Retries
	now       func() time.Time

	numResumes   int
	deadline     time.Time // zero: none
	numFruitless int
	// As they were when the running call was opened.
	numTokens, numEvents int
}

// open gives the request of the call that is opened now, which ends at a.deadline if that is set.
func (a *attempts) open(ctx context.Context) *runtimev1.GenerateStreamRequest {
	if a.deadline.IsZero() {
		a.deadline, _ = ctx.Deadline()
		if timeout := a.command.GetStart().GetTimeout(); timeout != nil {
			end := a.now().Add(timeout.AsDuration() + deadlineGrace)
			if a.deadline.IsZero() || end.Before(a.deadline) {
				a.deadline = end
			}
		}
	}
	a.numTokens, a.numEvents = a.collector.numTokens(), a.collector.numEvents
	if !a.collector.hasStarted {
		return a.command
	}
	a.numResumes++
	return resumeGeneration(a.collector.generationID, a.collector.receivedTokens)
}

// delay is how long to wait before the next call, now that one has failed; false: there is none.
func (a *attempts) delay(err *Error) (time.Duration, bool) {
	if a.collector.numTokens() > a.numTokens {
		a.numFruitless = 0
	}
	a.numFruitless++
	if a.collector.numEvents > a.numEvents && !isLostCall(err) {
		return 0, false // it is the generation that failed, not its call
	}
	if a.collector.hasStarted && a.collector.generationID == "" {
		return 0, false
	}
	delay, again := a.retries.delay(err, a.numFruitless)
	isTooLate := !a.deadline.IsZero() && !a.now().Add(delay).Before(a.deadline)
	return delay, again && !isTooLate
}

// resumeGeneration goes on with a generation after so many tokens of each sample.
func resumeGeneration(generationID string, receivedTokens []int32) *runtimev1.GenerateStreamRequest {
	resume := &runtimev1.ResumeGeneration{
		GenerationId:   generationID,
		ReceivedTokens: append([]int32(nil), receivedTokens...),
	}
	return &runtimev1.GenerateStreamRequest{
		Command: &runtimev1.GenerateStreamRequest_Resume{Resume: resume},
	}
}
