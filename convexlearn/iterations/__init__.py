"""Iterative solvers h_k with named slots, each written once."""
