"""The HTTP server: the APIs of OpenAI and Anthropic over the asyncio engine."""
