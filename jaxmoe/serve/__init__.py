"""Serving: what stands between an HTTP client and the engine."""
