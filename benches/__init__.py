"""Side-by-side measurements: `python -m benches.run [NAME…]` prints JSON lines. See docs/benchmarks.md."""
