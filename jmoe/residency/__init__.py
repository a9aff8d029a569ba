"""Where each expert is: the cache of slots on the device, the link to it, the prefetch thread."""
