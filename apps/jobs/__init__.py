"""From a request to files: what is asked for, how it is planned, run and written."""
