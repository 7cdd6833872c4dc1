"""NFQUEUE in, verdicts and sends out, batching, enc0."""
