"""What the benchmarks that compare engines share: checkpoints, engines in processes of their own, rounds, reports."""
