"""What eval.py reads, compares and prints."""
