"""Benchmarks: published network topologies, the peers they are measured against, and the harness that measures them."""
