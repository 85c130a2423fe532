"""The way to language models: one request, answered whole or as a stream, with its clocks, retries and fallbacks.

Owns connections, the wire and its cost. It knows nothing of conversations: what is asked comes from the chat room.
"""
