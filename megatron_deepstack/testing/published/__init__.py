"""Comparison with numbers of the published implementation: cases, data, and the ranks that compute ours."""
