"""Running it: the only room that knows both the maths and where the weights are."""
