"""What bench.py is made of: ceilings, suites, peers, and how results are reported."""
