"""What `imgdit bench` runs."""
