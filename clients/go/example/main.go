package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"millrace.io/millrace"
)

func main() {
	client, err := millrace.NewClient(millrace.DefaultRuntime, millrace.WithAPIKey(os.Getenv("MILLRACE_API_KEY")))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	stream := client.Generate(context.Background(), millrace.Text("Once upon a time"),
		millrace.WithMaxNewTokens(64), millrace.WithTemperature(0.8))
	defer stream.Close() // cancels what still runs
	for stream.Next() {
		fmt.Print(stream.Chunk().Text)
	}
	if err := stream.Err(); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("\n%.1f tokens/s\n", stream.Result().TokensPerSecond())
}
