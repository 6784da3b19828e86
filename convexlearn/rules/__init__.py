"""Decision rules: context x to decision s."""
