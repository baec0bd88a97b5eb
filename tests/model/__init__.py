"""Executable model of the protocol in docs/protocol.md, and the explorer that walks it."""
