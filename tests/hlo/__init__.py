"""What XLA makes of the model's programs on an H100, read from the compiled code; needs no GPU."""
