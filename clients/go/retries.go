package millrace

import (
	"math"
	"math/rand"
	"time"
)

// Retries says how patient a client is. A field that is 0 has its default.
type Retries struct {
	// MaxAttempts counts calls in all, 4 by default; 1 never tries again.
	MaxAttempts int
	// FirstDelay doubles with each attempt, where the daemon does not name a delay; 100 ms.
	FirstDelay time.Duration
	// MaxDelay bounds a wait, 30 s by default: a daemon that asks for longer is not waited for.
	MaxDelay time.Duration
}

func (r Retries) withDefaults() Retries {
	if r.MaxAttempts == 0 {
		r.MaxAttempts = 4
	}
	if r.FirstDelay == 0 {
		r.FirstDelay = 100 * time.Millisecond
	}
	if r.MaxDelay == 0 {
		r.MaxDelay = 30 * time.Second
	}
	return r
}

// delay is how long to wait before another try, after so many calls (at least 1); false where there
// is to be none.
func (r Retries) delay(err *Error, attempt int) (time.Duration, bool) {
	var delay float64 // nanoseconds: doubled often enough, it would overflow an integer
	switch {
	case attempt >= r.MaxAttempts:
		return 0, false
	case err.RetryAfter != nil:
		delay = float64(*err.RetryAfter)
	case isLostCall(err):
		delay = math.Ldexp(float64(r.FirstDelay), attempt-1)
	default:
		return 0, false
	}
	if delay > float64(r.MaxDelay) {
		return 0, false
	}
	// Spread out, so that refused clients do not come back all at once. Not by the shared source,
	// which starts alike in every process before Go 1.20.
	random := rand.New(rand.NewSource(time.Now().UnixNano()))
	return time.Duration(delay * (1 + random.Float64()/4)), true
}
