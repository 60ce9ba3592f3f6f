"""The asyncio engine: streams for the server, recovery after a failure, quarantine of requests."""
