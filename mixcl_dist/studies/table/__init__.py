"""The few-label table: what there is to run, running it, and what a single item does."""
