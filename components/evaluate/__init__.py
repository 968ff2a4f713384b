"""Judges a policy's rationales and answers on the held-out split."""
