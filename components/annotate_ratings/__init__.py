"""Has a teacher rate pairs of sampled responses."""
