package main

import (
	"encoding/json"
	"log"
	"strconv"
	"time"

	"millrace.io/millrace"
)

// generateOptions are by the names that the suite, and the Python SDK, have for them.
var generateOptions = map[string]func(json.RawMessage) millrace.GenerateOption{
	"max_new_tokens":     option(millrace.WithMaxNewTokens),
	"min_new_tokens":     option(millrace.WithMinNewTokens),
	"temperature":        option(millrace.WithTemperature),
	"top_k":              option(millrace.WithTopK),
	"top_p":              option(millrace.WithTopP),
	"min_p":              option(millrace.WithMinP),
	"repetition_penalty": option(millrace.WithRepetitionPenalty),
	"presence_penalty":   option(millrace.WithPresencePenalty),
	"frequency_penalty":  option(millrace.WithFrequencyPenalty),
	"logit_bias":         option(millrace.WithLogitBias),
	"seed":               option(withSeed),
	"n":                  option(millrace.WithN),
	"logprobs":           flag(millrace.WithLogprobs),
	"top_logprobs":       option(millrace.WithTopLogprobs),
	"prompt_logprobs":    flag(millrace.WithPromptLogprobs),
	"stop":               list(millrace.WithStop),
	"stop_token_ids":     list(millrace.WithStopTokenIDs),
	"ignore_end_tokens":  flag(millrace.WithIgnoreEndTokens),
	"timeout_s":          option(withTimeout),
	"priority":           option(millrace.WithPriority),
	"model":              option(millrace.WithModel),
	"template_arguments": option(withTemplateArguments),
}

func arguments(asked map[string]json.RawMessage) (millrace.Prompt, []millrace.GenerateOption) {
	var options []millrace.GenerateOption
	for name, value := range asked {
		if name == "prompt" {
			continue
		}
		make, isKnown := generateOptions[name]
		if !isKnown {
			log.Fatalf("there is no option %s", name)
		}
		options = append(options, make(value))
	}
	return prompt(asked["prompt"]), options
}

func prompt(value json.RawMessage) millrace.Prompt {
	var text millrace.Text
	if json.Unmarshal(value, &text) == nil {
		return text
	}
	var ids millrace.TokenIDs
	if json.Unmarshal(value, &ids) == nil {
		return ids
	}
	return decoded[millrace.Chat](value)
}

func withSeed(text string) millrace.GenerateOption {
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		log.Fatal(err)
	}
	return millrace.WithSeed(seed)
}

func withTemplateArguments(arguments map[string]any) millrace.GenerateOption {
	return millrace.WithTemplateArguments(arguments)
}

func withTimeout(seconds float64) millrace.GenerateOption {
	return millrace.WithTimeout(time.Duration(seconds * float64(time.Second)))
}

func option[T any](with func(T) millrace.GenerateOption) func(json.RawMessage) millrace.GenerateOption {
	return func(value json.RawMessage) millrace.GenerateOption { return with(decoded[T](value)) }
}

func list[T any](with func(...T) millrace.GenerateOption) func(json.RawMessage) millrace.GenerateOption {
	return func(value json.RawMessage) millrace.GenerateOption { return with(decoded[[]T](value)...) }
}

func flag(with func() millrace.GenerateOption) func(json.RawMessage) millrace.GenerateOption {
	return func(json.RawMessage) millrace.GenerateOption { return with() }
}

func decoded[T any](value json.RawMessage) T {
	var decoded T
	if err := json.Unmarshal(value, &decoded); err != nil {
		log.Fatal(err)
	}
	return decoded
}
