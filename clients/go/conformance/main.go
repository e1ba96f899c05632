// Runner of the conformance suite: a task a line on stdin, its result on stdout. See
// clients/conformance/README.md.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"log"
	"os"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"

	"millrace.io/millrace"
)

type task struct {
	Address string
	Options struct {
		MaxAttempts int    `json:"max_attempts"`
		APIKey      string `json:"api_key"`
		TLSCA       string `json:"tls_ca"`
		TLSCert     string `json:"tls_cert"`
		TLSKey      string `json:"tls_key"`
	}
	Do []action
}

type action struct {
	Generate map[string]json.RawMessage
	Resume   *struct {
		GenerationID   string  `json:"generation_id"`
		ReceivedTokens []int32 `json:"received_tokens"`
	}
	Session           []action
	Status            bool
	CancelAfterChunks int     `json:"cancel_after_chunks"`
	PauseAfterChunks  int     `json:"pause_after_chunks"`
	PauseS            float64 `json:"pause_s"`
	Terse             bool
}

// result is what came of an action, as the suite names it.
type result map[string]interface{}

func main() {
	log.SetFlags(0)
	lines := bufio.NewReader(os.Stdin)
	results := json.NewEncoder(os.Stdout)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var asked task
		if err := json.Unmarshal(line, &asked); err != nil {
			log.Fatal(err)
		}
		if err := results.Encode(map[string]interface{}{"results": run(asked)}); err != nil {
			log.Fatal(err)
		}
	}
}

func run(asked task) []result {
	ctx := context.Background()
	options := []millrace.Option{
		millrace.WithRetries(millrace.Retries{MaxAttempts: asked.Options.MaxAttempts}),
	}
	if key := asked.Options.APIKey; key != "" {
		options = append(options, millrace.WithAPIKey(key))
	}
	if ca := asked.Options.TLSCA; ca != "" {
		options = append(options, millrace.WithTLS(ca))
	}
	if own := asked.Options.TLSCert; own != "" {
		options = append(options, millrace.WithClientCertificate(own, asked.Options.TLSKey))
	}
	client, err := millrace.NewClient(asked.Address, options...)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	var results []result
	for _, one := range asked.Do {
		if one.Session == nil {
			results = append(results, act(ctx, client, client, one))
			continue
		}
		results = append(results, actAll(ctx, client, one.Session)...)
	}
	return results
}

func actAll(ctx context.Context, client *millrace.Client, actions []action) []result {
	session := client.Session(ctx)
	defer session.Close()
	results := make([]result, len(actions))
	var running sync.WaitGroup
	for i := range actions {
		i := i
		running.Add(1)
		go func() {
			defer running.Done()
			results[i] = act(ctx, client, session, actions[i])
		}()
	}
	running.Wait()
	return results
}

// generator is a client or a session.
type generator interface {
	Generate(context.Context, millrace.Prompt, ...millrace.GenerateOption) *millrace.Stream
}

func act(ctx context.Context, client *millrace.Client, on generator, asked action) result {
	if asked.Status {
		return status(ctx, client)
	}
	var stream *millrace.Stream
	if resume := asked.Resume; resume != nil {
		stream = client.Resume(ctx, resume.GenerationID, resume.ReceivedTokens)
	} else {
		prompt, options := arguments(asked.Generate)
		stream = on.Generate(ctx, prompt, options...)
	}
	defer stream.Close()
	return read(ctx, client, stream, asked)
}

func status(ctx context.Context, client *millrace.Client) result {
	status, err := client.Status(ctx)
	if err != nil {
		return failed(result{}, err)
	}
	return result{
		"ended": "finished", "state": states[status.GetState()],
		"engine": status.GetEngine().GetName(), "model": status.GetEngine().GetModel(),
	}
}

func read(
	ctx context.Context, client *millrace.Client, stream *millrace.Stream, asked action,
) result {
	report := reader{terse: asked.Terse}
	for stream.Next() {
		report.take(stream.Chunk())
		switch report.numChunks {
		case asked.CancelAfterChunks:
			stream.Close()
		case asked.PauseAfterChunks:
			time.Sleep(time.Duration(asked.PauseS * float64(time.Second)))
			if _, err := client.Status(ctx); err != nil {
				return failed(report.result(), err)
			}
		}
	}
	told := report.result()
	if err := stream.Err(); err != nil {
		return failed(told, err)
	}
	told["num_resumes"], told["received_tokens"] = stream.NumResumes(), stream.ReceivedTokens()
	told["ended"] = "cancelled"
	if generation := stream.Result(); generation != nil {
		finished(told, generation, asked.Terse)
	}
	return told
}

func failed(told result, err error) result {
	var known *millrace.Error
	if !errors.As(err, &known) {
		log.Fatal(err)
	}
	failure := result{
		"reason": known.Reason, "code": code.Code(known.Code).String(), "message": known.Message,
		"metadata": known.Metadata, "retry_after_s": nil,
	}
	if known.RetryAfter != nil {
		failure["retry_after_s"] = known.RetryAfter.Seconds()
	}
	told["ended"], told["error"] = "error", failure
	return told
}
