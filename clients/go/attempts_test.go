package millrace

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	runtimev1 "millrace.io/millrace/gen/millrace/runtime/v1"
)

var lost = &Error{Message: "lost", Reason: ReasonUnreachable, Code: codes.Unavailable}

func newAttempts(now func() time.Time, options ...GenerateOption) *attempts {
	command, _ := startGeneration(Text("hello"), options)
	retries := Retries{MaxAttempts: 3}.withDefaults()
	return &attempts{command: command, collector: newCollector(nil), retries: retries, now: now}
}

func started(generationID string) *runtimev1.Event {
	said := &runtimev1.GenerationStarted{GenerationId: generationID}
	return &runtimev1.Event{Event: &runtimev1.Event_Started{Started: said}}
}

func TestNoCallBeginsAfterTheTimeout(t *testing.T) {
	now := time.Unix(1000, 0)
	tried := newAttempts(func() time.Time { return now }, WithTimeout(time.Second))
	tried.open(context.Background())
	if left := tried.deadline.Sub(now); left != 1500*time.Millisecond {
		t.Errorf("the call may take %v", left)
	}
	if _, again := tried.delay(lost); !again {
		t.Error("it gives up with time left")
	}
	now = now.Add(1450 * time.Millisecond)
	if _, again := tried.delay(lost); again {
		t.Error("it waits beyond the deadline")
	}
}

func TestDeadlineOfTheContextIsKeptWhereItIsEarlier(t *testing.T) {
	now := time.Now()
	ctx, cancel := context.WithDeadline(context.Background(), now.Add(time.Minute))
	defer cancel()
	for timeout, wanted := range map[time.Duration]time.Duration{
		time.Hour:   time.Minute,
		time.Second: 1500 * time.Millisecond,
	} {
		tried := newAttempts(func() time.Time { return now }, WithTimeout(timeout))
		tried.open(ctx)
		if left := tried.deadline.Sub(now); left != wanted {
			t.Errorf("with a timeout of %v the call may take %v", timeout, left)
		}
	}
}

func TestLossesThatBringNoTokenEnd(t *testing.T) {
	tried := newAttempts(time.Now)
	for _, wanted := range []bool{true, true, false} {
		tried.open(context.Background())
		if _, err := tried.collector.take(started("x1")); err != nil {
			t.Fatal(err)
		}
		if _, again := tried.delay(lost); again != wanted {
			t.Fatalf("another call: %v", again)
		}
	}
	if tried.numResumes != 2 {
		t.Errorf("resumed %d times", tried.numResumes)
	}
}

func TestDelaysDoubleUpToTheLimitAndAreSpread(t *testing.T) {
	retries := Retries{MaxAttempts: 100, FirstDelay: time.Second, MaxDelay: 8 * time.Second}
	for attempt, wanted := range []time.Duration{1, 2, 4, 8} {
		delay, again := retries.delay(lost, attempt+1)
		if wanted *= time.Second; !again || delay < wanted || delay > wanted*5/4 {
			t.Errorf("attempt %d is followed after %v (%v)", attempt+1, delay, again)
		}
	}
	for _, attempt := range []int{5, 64, 99} {
		if delay, again := retries.delay(lost, attempt); again {
			t.Errorf("attempt %d is followed after %v", attempt, delay)
		}
	}
}
