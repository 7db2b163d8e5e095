"""Reading scores and bytes out of a student: one definition of scoring, joint generation, the causal byte filter."""
