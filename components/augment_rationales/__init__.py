"""Has a teacher write the rationales that a data set lacks."""
