"""What `imgdit bench` measures: metrics, probes and tables."""
