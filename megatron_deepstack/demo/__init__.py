"""The demo's task: pages with a number printed too small for the global view, and questions about it."""
