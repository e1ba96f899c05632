"""Processes that take clients' calls in a daemon's place and bring it many of them on one.

A stream on a call of its own costs a process a write and two wakes for each token, whoever made the
token. That cost is the relays', of which there are as many as wanted; the daemon behind them sends
each a message a step. What they cannot join they pass on byte by byte, so a client sees one daemon.
"""
