"""QPs and LPs in batches."""
