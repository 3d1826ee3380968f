"""How a benchmark runs: jobs, executors, journal, records."""
