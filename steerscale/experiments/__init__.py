"""Whole experiments: stages that make data, train, measure; each resumable. `launch.experiment` starts them."""
