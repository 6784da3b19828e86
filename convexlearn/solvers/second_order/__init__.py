"""Programs with second-order cones in batches, in SIMD lanes."""
