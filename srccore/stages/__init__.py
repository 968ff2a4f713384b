"""One function per stage: all that a container runs.

A stage reads what it is given, writes one output folder and returns its figures; the folder's
manifest comes last. A finished stage of the same inputs is skipped, an unfinished one resumes
from its durable parts (`folder`, `journal`). Stages know nothing of each other, of earlier rounds
or of Kubernetes. Only `evaluate` is ever given the held-out split. Where several processes train
together, each has an output folder of its own, and that of the first is the stage's.
"""
