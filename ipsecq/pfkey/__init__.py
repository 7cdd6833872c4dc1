"""PF_KEYv2: messages, server, client."""
