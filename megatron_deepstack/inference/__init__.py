"""Answers to held-out questions, and their score."""
