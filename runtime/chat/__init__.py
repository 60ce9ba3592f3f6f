"""Chat formats: reasoning and tool calls in a model's text, and grammars that make it write calls."""
