"""Tokens: choosing the next one, deciding when to stop, turning them into text."""
