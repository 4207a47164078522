"""Stores behind a URL: arrays read in blocks, views as byte ranges, and one bounded cache for all of it."""
