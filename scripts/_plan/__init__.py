"""What plan.py prints."""
