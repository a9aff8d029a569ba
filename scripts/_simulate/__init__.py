"""What simulate.py replays, prints and draws."""
