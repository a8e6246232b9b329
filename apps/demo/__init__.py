"""The demo in the browser: one tab per file; `app` puts them together."""
