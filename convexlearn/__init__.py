"""convexlearn: decision rules tuned from data."""
