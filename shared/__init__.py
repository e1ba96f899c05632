"""What both daemons use: engine identity, graph, store, errors, server, settings, log."""
