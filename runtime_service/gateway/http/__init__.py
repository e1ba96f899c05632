"""The gateway over HTTP: the API that OpenAI's clients speak, and a page to look at."""
