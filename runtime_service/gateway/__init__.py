"""The gateway: one RuntimeService in front of many runtimes; no engine, no torch, no GPU."""
