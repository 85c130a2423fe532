"""The doors: HTTP, server-sent events, WebSocket, webhooks, plugin pages, admin, probes.

They prove who speaks, read and write the wire, and leave everything else to the chat room.
"""
