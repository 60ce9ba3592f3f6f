"""Pydantic models of the request and response bodies of the HTTP API."""
