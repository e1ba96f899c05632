package millrace

import (
	"encoding/json"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	runtimev1 "millrace.io/millrace/gen/millrace/runtime/v1"
)

// Prompt is what to continue: Text, TokenIDs or Chat.
type Prompt interface {
	setOn(start *runtimev1.StartGeneration)
}

// Text is tokenized with the engine's tokenizer.
type Text string

// TokenIDs are used as they are.
type TokenIDs []uint32

// Chat is a conversation, rendered with the model's chat template.
type Chat []Message

// Message is one turn of a conversation. Its role is system, user, assistant, or another one that
// the template knows.
type Message struct {
	Role, Content string
}

func (t Text) setOn(start *runtimev1.StartGeneration) {
	start.Prompt = &runtimev1.StartGeneration_Text{Text: string(t)}
}

func (ids TokenIDs) setOn(start *runtimev1.StartGeneration) {
	start.Prompt = &runtimev1.StartGeneration_TokenIds{TokenIds: &runtimev1.TokenIds{Ids: ids}}
}

func (c Chat) setOn(start *runtimev1.StartGeneration) {
	chat := &runtimev1.Chat{}
	for _, message := range c {
		wire := &runtimev1.ChatMessage{Role: message.Role, Content: message.Content}
		chat.Messages = append(chat.Messages, wire)
	}
	start.Prompt = &runtimev1.StartGeneration_Chat{Chat: chat}
}

// GenerateOption is something asked of a generation; SamplingParams and StopConditions of the
// protocol document each. Decoding is greedy unless WithTemperature says otherwise.
type GenerateOption func(start *asked)

// asked is a generation while its options are set, and what is wrong with one of them.
type asked struct {
	*runtimev1.StartGeneration
	err error
}

// startGeneration gives the wire form of what is asked, and an *Error where that cannot be sent.
func startGeneration(
	prompt Prompt, options []GenerateOption,
) (*runtimev1.GenerateStreamRequest, error) {
	start := asked{StartGeneration: &runtimev1.StartGeneration{
		Sampling: &runtimev1.SamplingParams{},
		Stop:     &runtimev1.StopConditions{},
	}}
	prompt.setOn(start.StartGeneration)
	for _, option := range options {
		option(&start)
	}
	// Sent, a text that is not UTF-8 would end a session's call, and with it all of its streams.
	if _, err := proto.Marshal(start.StartGeneration); err != nil {
		start.err = invalidField("start", err.Error())
	}
	return &runtimev1.GenerateStreamRequest{
		Command: &runtimev1.GenerateStreamRequest_Start{Start: start.StartGeneration},
	}, start.err
}

// WithMaxNewTokens ends it after so many tokens; otherwise it may go up to the engine's limit.
func WithMaxNewTokens(tokens int32) GenerateOption {
	return func(start *asked) { start.Stop.MaxNewTokens = tokens }
}

// WithMinNewTokens keeps end tokens and stop strings from ending it before.
func WithMinNewTokens(tokens int32) GenerateOption {
	return func(start *asked) { start.Stop.MinNewTokens = tokens }
}

// WithStop ends it at any of these strings, which are not part of its text.
func WithStop(strings ...string) GenerateOption {
	return func(start *asked) { start.Stop.Strings = strings }
}

// WithStopTokenIDs ends it at any of these, beside the model's own end tokens.
func WithStopTokenIDs(ids ...uint32) GenerateOption {
	return func(start *asked) { start.Stop.TokenIds = ids }
}

// WithIgnoreEndTokens goes on past the model's own end tokens; for benchmarks.
func WithIgnoreEndTokens() GenerateOption {
	return func(start *asked) { start.Stop.IgnoreEndTokens = true }
}

// WithTemperature draws tokens, from 0 (the likeliest) to 100.
func WithTemperature(temperature float32) GenerateOption {
	return func(start *asked) { start.Sampling.Temperature = temperature }
}

// WithTopK keeps the k likeliest tokens.
func WithTopK(k int32) GenerateOption {
	return func(start *asked) { start.Sampling.TopK = k }
}

// WithTopP keeps the likeliest tokens up to this probability, over 0 and up to 1.
func WithTopP(p float32) GenerateOption {
	return func(start *asked) { start.Sampling.TopP = proto.Float32(p) }
}

// WithMinP keeps tokens at least this likely relative to the likeliest; 0 to 1.
func WithMinP(p float32) GenerateOption {
	return func(start *asked) { start.Sampling.MinP = p }
}

// WithRepetitionPenalty makes tokens of the prompt and the output less likely where it is over 1.
func WithRepetitionPenalty(penalty float32) GenerateOption {
	return func(start *asked) {
		start.Sampling.RepetitionPenalty = proto.Float32(penalty)
	}
}

// WithPresencePenalty is taken off the logits of tokens in the output; -2 to 2.
func WithPresencePenalty(penalty float32) GenerateOption {
	return func(start *asked) { start.Sampling.PresencePenalty = penalty }
}

// WithFrequencyPenalty is taken off per occurrence in the output; -2 to 2.
func WithFrequencyPenalty(penalty float32) GenerateOption {
	return func(start *asked) { start.Sampling.FrequencyPenalty = penalty }
}

// WithLogitBias is added to the logits of these tokens; -100 bans and 100 forces, nearly.
func WithLogitBias(bias map[uint32]float32) GenerateOption {
	return func(start *asked) { start.Sampling.LogitBias = bias }
}

// WithSeed makes it repeatable; otherwise the server draws one, which Generation.Seed tells.
func WithSeed(seed uint64) GenerateOption {
	return func(start *asked) { start.Sampling.Seed = proto.Uint64(seed) }
}

// WithN draws so many samples from one prompt; at most 64.
func WithN(samples int32) GenerateOption {
	return func(start *asked) { start.Sampling.N = samples }
}

// WithLogprobs reports the log probability of each token.
func WithLogprobs() GenerateOption {
	return func(start *asked) { start.Sampling.Logprobs = true }
}

// WithTopLogprobs reports so many likeliest tokens beside each token; at most 20.
func WithTopLogprobs(tokens int32) GenerateOption {
	return func(start *asked) { start.Sampling.TopLogprobs = tokens }
}

// WithPromptLogprobs reports the log probabilities of the prompt's tokens.
func WithPromptLogprobs() GenerateOption {
	return func(start *asked) { start.Sampling.PromptLogprobs = true }
}

// WithTimeout lets the daemon end it with DEADLINE_EXCEEDED when it takes longer, queueing and
// retries included. The client gives up half a second later. A deadline of the context is the
// client's alone, and is kept as well.
func WithTimeout(timeout time.Duration) GenerateOption {
	return func(start *asked) { start.Timeout = durationpb.New(timeout) }
}

// WithPriority puts it before those with less; -100 to 100.
func WithPriority(priority int32) GenerateOption {
	return func(start *asked) { start.Priority = priority }
}

// WithModel chooses a deployment or a model of a gateway.
func WithModel(model string) GenerateOption {
	return func(start *asked) { start.Model = model }
}

// WithTemplateArguments gives a Chat's template what it reads beside the messages, such as
// map[string]any{"enable_thinking": false}: whatever encoding/json writes as an object, in its order,
// and a json.RawMessage as it is. A prompt without messages fails with INVALID_FIELD.
func WithTemplateArguments(arguments any) GenerateOption {
	return func(start *asked) {
		written, err := json.Marshal(arguments)
		switch {
		case err != nil:
			start.err = invalidField("template_arguments", err.Error())
		case start.GetChat() == nil:
			start.err = invalidField("template_arguments", "needs messages, which go through a template")
		default:
			start.GetChat().TemplateArguments = string(written)
		}
	}
}

// WithTraceparent makes a W3C trace context (00-...) the parent of what daemons do for it.
func WithTraceparent(traceparent string) GenerateOption {
	return func(start *asked) { start.Traceparent = traceparent }
}
