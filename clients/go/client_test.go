package millrace

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	runtimev1 "millrace.io/millrace/gen/millrace/runtime/v1"
)

// endless is a daemon whose generations say one word and go on until they are cancelled.
type endless struct {
	runtimev1.UnimplementedRuntimeServiceServer
	cancelled chan string
}

var hello = []*runtimev1.Event{started(""), {Event: &runtimev1.Event_Tokens{
	Tokens: &runtimev1.TokenChunk{TokenIds: []uint32{1}, Text: "hello"},
}}}

func (d *endless) GenerateStream(
	request *runtimev1.GenerateStreamRequest, stream runtimev1.RuntimeService_GenerateStreamServer,
) error {
	if err := stream.Send(&runtimev1.GenerateStreamResponse{Events: hello}); err != nil {
		return err
	}
	<-stream.Context().Done()
	d.cancelled <- request.GetStart().GetText()
	return status.FromContextError(stream.Context().Err()).Err() // a deadline may end here first
}

func (d *endless) Generate(stream runtimev1.RuntimeService_GenerateServer) error {
	texts := map[string]string{}
	for {
		request, err := stream.Recv()
		if err != nil {
			return err
		}
		if cancel := request.GetCancel(); cancel != nil {
			d.cancelled <- texts[cancel.GetRequestId()]
			continue
		}
		start := request.GetStart()
		texts[start.GetRequestId()] = start.GetText()
		response := &runtimev1.GenerateResponse{}
		for _, event := range hello {
			named := &runtimev1.Event{RequestId: start.GetRequestId(), Event: event.Event}
			response.Events = append(response.Events, named)
		}
		if err := stream.Send(response); err != nil {
			return err
		}
	}
}

func serve(t *testing.T) (*endless, *Client) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	daemon := &endless{cancelled: make(chan string, 100)}
	server := grpc.NewServer()
	runtimev1.RegisterRuntimeServiceServer(server, daemon)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	client, err := NewClient(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return daemon, client
}

// generator is a client or a session.
type generator interface {
	Generate(context.Context, Prompt, ...GenerateOption) *Stream
}

// eachGenerator runs a test with a call of its own, and with a session's.
func eachGenerator(t *testing.T, test func(*testing.T, *endless, generator)) {
	t.Run("own call", func(t *testing.T) {
		daemon, client := serve(t)
		test(t, daemon, client)
	})
	t.Run("session", func(t *testing.T) {
		daemon, client := serve(t)
		session := client.Session(context.Background())
		defer session.Close()
		test(t, daemon, session)
	})
}

func (d *endless) wantCancelled(t *testing.T, text string) {
	t.Helper()
	select {
	case found := <-d.cancelled:
		if found != text {
			t.Fatalf("%q was cancelled", found)
		}
	case <-time.After(60 * time.Second):
		t.Fatalf("%q was not cancelled", text)
	}
}

func TestEndOfAContextCancelsOnTheDaemonAndIsTheError(t *testing.T) {
	eachGenerator(t, func(t *testing.T, daemon *endless, on generator) {
		ctx, cancel := context.WithCancel(context.Background())
		stream := on.Generate(ctx, Text("a"))
		if !stream.Next() || stream.Chunk().Text != "hello" {
			t.Fatal(stream.Err())
		}
		cancel()
		daemon.wantCancelled(t, "a") // before anybody reads on
		if stream.Next() {
			t.Fatal("it goes on")
		}
		var failed *Error
		if !errors.Is(stream.Err(), context.Canceled) || !errors.As(stream.Err(), &failed) {
			t.Fatal(stream.Err())
		}
		if failed.Reason != "CANCELLED" || status.Code(failed) != codes.Canceled {
			t.Errorf("%+v", failed)
		}
	})
}

func TestDeadlineOfAContextIsTheError(t *testing.T) {
	eachGenerator(t, func(t *testing.T, daemon *endless, on generator) {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		_, err := on.Generate(ctx, Text("a")).Wait()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	})
}

func TestCloseFromAnotherGoroutineEndsAReaderWithoutAnError(t *testing.T) {
	eachGenerator(t, func(t *testing.T, daemon *endless, on generator) {
		stream := on.Generate(context.Background(), Text("a"))
		if !stream.Next() {
			t.Fatal(stream.Err())
		}
		go stream.Close()
		if stream.Next() || stream.Err() != nil || stream.Result() != nil {
			t.Fatal(stream.Err(), stream.Result())
		}
		daemon.wantCancelled(t, "a")
	})
}

func TestContextThatHasEndedCallsNobody(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	open := func(context.Context, *runtimev1.GenerateStreamRequest) (call, error) {
		t.Error("it calls")
		return nil, io.EOF
	}
	command, _ := startGeneration(Text("a"), nil)
	stream := newStream(ctx, open, command, "nobody", Retries{}.withDefaults())
	if _, err := stream.Wait(); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

func TestCloseOfASessionEndsItsStreams(t *testing.T) {
	_, client := serve(t)
	session := client.Session(context.Background())
	stream := session.Generate(context.Background(), Text("a"))
	if !stream.Next() {
		t.Fatal(stream.Err())
	}
	session.Close()
	if _, err := stream.Wait(); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

func TestNothingIsLeftOfManyCancelledStreams(t *testing.T) {
	daemon, client := serve(t)
	before := runtime.NumGoroutine()
	session := client.Session(context.Background())
	var readers sync.WaitGroup
	for i := 0; i < 50; i++ {
		for _, on := range []generator{client, session} {
			readers.Add(1)
			stream := on.Generate(context.Background(), Text(fmt.Sprint(i)))
			go func() {
				defer readers.Done()
				defer stream.Close()
				if !stream.Next() {
					t.Error(stream.Err())
				}
			}()
		}
	}
	readers.Wait()
	for i := 0; i < 100; i++ {
		<-daemon.cancelled
	}
	session.Close()
	client.Close()
	deadline := time.Now().Add(60 * time.Second)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines more than before", runtime.NumGoroutine()-before)
		}
		runtime.Gosched()
	}
}

func TestStreamHasNoResultBeforeItsEnd(t *testing.T) {
	_, client := serve(t)
	stream := client.Generate(context.Background(), Text("a"))
	defer stream.Close()
	if !stream.Next() || stream.Result() != nil {
		t.Fatal(stream.Result(), stream.Err())
	}
}

func TestUnaryErrorsAreTyped(t *testing.T) {
	_, client := serve(t)
	_, err := client.Status(context.Background())
	var failed *Error
	if !errors.As(err, &failed) || failed.Reason != "UNIMPLEMENTED" {
		t.Fatal(err)
	}
}

func TestWhatCannotWorkIsRefusedAtOnce(t *testing.T) {
	noCertificate := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(noCertificate, []byte("none"), 0o600); err != nil {
		t.Fatal(err)
	}
	for wanted, options := range map[string][]Option{
		"over TLS alone":              {WithAPIKey("mr_x")},
		"goes with WithTLS":           {WithClientCertificate("client.crt", "client.key")},
		"stands for itself":           {WithTLSConfig(&tls.Config{}), WithTLS("ca.crt")},
		"it has no certificate":       {WithTLS(noCertificate)},
		"cannot use the CA: open abs": {WithTLS("absent.crt")},
	} {
		if _, err := NewClient("runtime:7602", options...); err == nil ||
			!strings.Contains(err.Error(), wanted) {
			t.Errorf("%v, not %q", err, wanted)
		}
	}
}

func TestTemplateArgumentsNeedMessagesAndJSON(t *testing.T) {
	eachGenerator(t, func(t *testing.T, daemon *endless, on generator) {
		for wanted, refused := range map[string]struct {
			prompt    Prompt
			arguments any
		}{
			"needs messages":       {Text("a"), map[string]any{"enable_thinking": false}},
			"unsupported type":     {Chat{{"user", "a"}}, map[string]any{"a": func() {}}},
			"template_arguments: ": {TokenIDs{1}, nil},
		} {
			stream := on.Generate(
				context.Background(), refused.prompt, WithTemplateArguments(refused.arguments))
			_, err := stream.Wait()
			var failed *Error
			if !errors.As(err, &failed) || failed.Reason != "INVALID_FIELD" ||
				!strings.Contains(failed.Message, wanted) {
				t.Errorf("%v, not %q", err, wanted)
			}
		}
	})
}

func TestTextThatIsNotUTF8FailsAloneAmongOthers(t *testing.T) {
	eachGenerator(t, func(t *testing.T, daemon *endless, on generator) {
		other := on.Generate(context.Background(), Text("a"))
		defer other.Close()
		if !other.Next() {
			t.Fatal(other.Err())
		}
		_, err := on.Generate(context.Background(), Text("caf\xe9")).Wait()
		var failed *Error
		if !errors.As(err, &failed) || failed.Reason != "INVALID_FIELD" {
			t.Errorf("%v", err)
		}
		if late := on.Generate(context.Background(), Text("b")); !late.Next() {
			t.Error(late.Err())
		}
		go other.Close()
		if other.Next() || other.Err() != nil {
			t.Error(other.Err())
		}
	})
}

func TestTemplateArgumentsKeepTheirDigitsAndOrder(t *testing.T) {
	written := json.RawMessage(`{"b":1.0,"a":12345678901234567890}`)
	command, err := startGeneration(
		Chat{{"user", "a"}}, []GenerateOption{WithTemplateArguments(written)})
	if found := command.GetStart().GetChat().GetTemplateArguments(); err != nil ||
		found != string(written) {
		t.Error(found, err)
	}
}

func TestReadmeShowsTheExample(t *testing.T) {
	program, err := os.ReadFile("example/main.go")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), "```go\n"+string(program)+"```\n") {
		t.Error("README.md has another program than example/main.go")
	}
}
