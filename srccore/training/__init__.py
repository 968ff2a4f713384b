"""Fine-tuning with TRL: rationale tuning, R-Scorer and DPO, in one process or several."""
