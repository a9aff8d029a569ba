"""Helpers of scripts/compare_peers.py. The workers run in other Pythons: see worker.py."""
