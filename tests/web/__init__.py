"""The doors, from outside: HTTP, server-sent events, WebSocket, webhooks, pages, admin."""
