"""Small models that stand in for a learner's where a check needs one: no check borrows the reference."""
