package millrace

import (
	"sort"
	"strings"
	"time"

	runtimev1 "millrace.io/millrace/gen/millrace/runtime/v1"
)

// TokenLogprob says how likely a token was.
type TokenLogprob = runtimev1.TokenLogprob

// Chunk is new tokens of one sample.
type Chunk struct {
	// Text is what they add; it may be empty while a character is unfinished, and is valid UTF-8.
	Text        string
	TokenIDs    []uint32
	SampleIndex int
	// Logprobs are one per token, when asked for.
	Logprobs []*TokenLogprob
	// PromptLogprobs are one per prompt token after the first, when asked for; in first chunks only.
	PromptLogprobs []*TokenLogprob
}

// FinishReason is why a sample ended.
type FinishReason string

// Why samples end. FinishUnspecified: a newer server has a reason that this client lacks.
const (
	FinishStopToken   FinishReason = "stop_token"
	FinishStopString  FinishReason = "stop_string"
	FinishLength      FinishReason = "length"
	FinishCancelled   FinishReason = "cancelled"
	FinishUnspecified FinishReason = "unspecified"
)

// Sample is one whole answer, and what ended it.
type Sample struct {
	Text         string
	TokenIDs     []uint32
	FinishReason FinishReason
	// StopString and StopTokenID are what ended it, where they did.
	StopString  string
	StopTokenID *uint32
}

// Generation is a finished one.
type Generation struct {
	Samples []Sample
	// Seed repeats it exactly.
	Seed               uint64
	PromptTokens       int
	CachedPromptTokens int
	// GeneratedTokens counts all samples.
	GeneratedTokens int
	// Queued, TimeToFirstToken and Total count from the start; the daemon measured them.
	Queued           time.Duration
	TimeToFirstToken time.Duration
	Total            time.Duration
}

// Text is the first sample's.
func (g *Generation) Text() string {
	if len(g.Samples) == 0 {
		return ""
	}
	return g.Samples[0].Text
}

// TokensPerSecond counts tokens after the first one of each sample; 0 where there were none.
func (g *Generation) TokensPerSecond() float64 {
	rest, took := g.GeneratedTokens-len(g.Samples), g.Total-g.TimeToFirstToken
	if rest <= 0 || took <= 0 {
		return 0
	}
	return float64(rest) / took.Seconds()
}

// collector turns the events of one generation into chunks, and at the end into a Generation.
type collector struct {
	generationID   string
	receivedTokens []int32 // by sample
	numEvents      int
	hasStarted     bool
	result         *Generation

	seed     uint64
	texts    map[int32]*strings.Builder
	tokenIDs map[int32][]uint32
}

// newCollector begins with what the reader of a generation that is resumed had before.
func newCollector(resumed *runtimev1.ResumeGeneration) *collector {
	return &collector{
		generationID:   resumed.GetGenerationId(),
		receivedTokens: append([]int32(nil), resumed.GetReceivedTokens()...),
		texts:          map[int32]*strings.Builder{},
		tokenIDs:       map[int32][]uint32{},
	}
}

// take gives the chunk that an event brings, or nil; an error where the generation has failed.
func (c *collector) take(event *runtimev1.Event) (*Chunk, error) {
	if c.result != nil {
		return nil, nil // nothing follows the end
	}
	if failed := event.GetError(); failed != nil {
		return nil, fromEvent(failed)
	}
	c.numEvents++
	c.hasStarted = true
	switch event := event.GetEvent().(type) {
	case *runtimev1.Event_Started:
		c.seed, c.generationID = event.Started.GetSeed(), event.Started.GetGenerationId()
	case *runtimev1.Event_Tokens:
		return c.takeTokens(event.Tokens), nil
	case *runtimev1.Event_Finished:
		c.result = c.finish(event.Finished)
	}
	return nil, nil
}

func (c *collector) takeTokens(tokens *runtimev1.TokenChunk) *Chunk {
	index := tokens.GetSampleIndex()
	for len(c.receivedTokens) <= int(index) {
		c.receivedTokens = append(c.receivedTokens, 0)
	}
	c.receivedTokens[index] += int32(len(tokens.GetTokenIds()))
	if c.texts[index] == nil {
		c.texts[index] = &strings.Builder{}
	}
	c.texts[index].WriteString(tokens.GetText())
	c.tokenIDs[index] = append(c.tokenIDs[index], tokens.GetTokenIds()...)
	return &Chunk{
		Text:           tokens.GetText(),
		TokenIDs:       tokens.GetTokenIds(),
		SampleIndex:    int(index),
		Logprobs:       tokens.GetLogprobs(),
		PromptLogprobs: tokens.GetPromptLogprobs(),
	}
}

func (c *collector) finish(finished *runtimev1.GenerationFinished) *Generation {
	usage, timings := finished.GetUsage(), finished.GetTimings()
	result := &Generation{
		Seed:               c.seed,
		PromptTokens:       int(usage.GetPromptTokens()),
		CachedPromptTokens: int(usage.GetCachedPromptTokens()),
		GeneratedTokens:    int(usage.GetGeneratedTokens()),
		Queued:             timings.GetQueued().AsDuration(),
		TimeToFirstToken:   timings.GetTimeToFirstToken().AsDuration(),
		Total:              timings.GetTotal().AsDuration(),
	}
	ends := append([]*runtimev1.SampleFinish(nil), finished.GetSamples()...)
	sort.Slice(ends, func(i, j int) bool { return ends[i].GetSampleIndex() < ends[j].GetSampleIndex() })
	for _, end := range ends {
		sample := Sample{
			TokenIDs:     c.tokenIDs[end.GetSampleIndex()],
			FinishReason: finishReason(end.GetReason()),
			StopString:   end.GetStopString(),
			StopTokenID:  end.StopTokenId,
		}
		if text := c.texts[end.GetSampleIndex()]; text != nil {
			sample.Text = text.String()
		}
		result.Samples = append(result.Samples, sample)
	}
	return result
}

// numTokens counts what has arrived, over all samples.
func (c *collector) numTokens() int {
	sum := 0
	for _, tokens := range c.receivedTokens {
		sum += int(tokens)
	}
	return sum
}

func finishReason(reason runtimev1.FinishReason) FinishReason {
	switch reason {
	case runtimev1.FinishReason_FINISH_REASON_STOP_TOKEN:
		return FinishStopToken
	case runtimev1.FinishReason_FINISH_REASON_STOP_STRING:
		return FinishStopString
	case runtimev1.FinishReason_FINISH_REASON_LENGTH:
		return FinishLength
	case runtimev1.FinishReason_FINISH_REASON_CANCELLED:
		return FinishCancelled
	}
	return FinishUnspecified
}
