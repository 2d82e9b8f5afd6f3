"""The server of scripts/serve.py: what a request may say, the sessions, the decoding, and the routes that join them."""
