"""What scripts/hardware.py prints."""
