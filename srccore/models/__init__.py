"""Models and teachers: the policy, R-Scorer's engine and the endpoints that are asked."""
