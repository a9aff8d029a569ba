"""What quality.py measures and writes."""
