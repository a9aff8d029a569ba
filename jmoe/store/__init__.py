"""Models at rest: checkpoints, tokenizers and the hub. Knows bytes, not arithmetic."""
