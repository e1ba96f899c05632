package main

import (
	"strconv"

	"millrace.io/millrace"
	runtimev1 "millrace.io/millrace/gen/millrace/runtime/v1"
)

var states = map[runtimev1.RuntimeState]string{
	runtimev1.RuntimeState_RUNTIME_STATE_SERVING:  "serving",
	runtimev1.RuntimeState_RUNTIME_STATE_DRAINING: "draining",
}

// reader notes what arrives of one generation.
type reader struct {
	terse                    bool
	numChunks, numBytes      int
	chunks                   []string
	logprobs, promptLogprobs [][]result
}

func (r *reader) take(chunk millrace.Chunk) {
	r.numChunks++
	r.numBytes += len(chunk.Text)
	if !r.terse {
		r.chunks = append(r.chunks, chunk.Text)
		r.logprobs = append(r.logprobs, logprobs(chunk.Logprobs))
		r.promptLogprobs = append(r.promptLogprobs, logprobs(chunk.PromptLogprobs))
	}
}

func (r *reader) result() result {
	told := result{"num_chunks": r.numChunks, "num_bytes": r.numBytes}
	if !r.terse {
		// A nil slice would be null.
		told["chunks"] = append([]string{}, r.chunks...)
		told["logprobs"] = append([][]result{}, r.logprobs...)
		told["prompt_logprobs"] = append([][]result{}, r.promptLogprobs...)
	}
	return told
}

func logprobs(entries []*millrace.TokenLogprob) []result {
	told := []result{}
	for _, entry := range entries {
		top := []result{}
		for _, candidate := range entry.GetTop() {
			top = append(top, result{
				"token_id": candidate.GetTokenId(), "logprob": candidate.GetLogprob(),
			})
		}
		told = append(told, result{
			"token_id": entry.GetTokenId(), "logprob": entry.GetLogprob(),
			"rank": entry.GetRank(), "top": top,
		})
	}
	return told
}

func finished(told result, generation *millrace.Generation, terse bool) {
	told["ended"] = "finished"
	if terse {
		return
	}
	samples := []result{}
	for _, sample := range generation.Samples {
		samples = append(samples, result{
			"text": sample.Text, "token_ids": append([]uint32{}, sample.TokenIDs...),
			"finish_reason": sample.FinishReason, "stop_string": sample.StopString,
			"stop_token_id": sample.StopTokenID,
		})
	}
	for name, value := range map[string]interface{}{
		"text":                  generation.Text(),
		"samples":               samples,
		"seed":                  strconv.FormatUint(generation.Seed, 10),
		"prompt_tokens":         generation.PromptTokens,
		"cached_prompt_tokens":  generation.CachedPromptTokens,
		"generated_tokens":      generation.GeneratedTokens,
		"queued_s":              generation.Queued.Seconds(),
		"time_to_first_token_s": generation.TimeToFirstToken.Seconds(),
		"total_s":               generation.Total.Seconds(),
		"tokens_per_s":          generation.TokensPerSecond(),
	} {
		told[name] = value
	}
}
